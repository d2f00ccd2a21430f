"""Folders of Hugging Face: names and shapes, round trips, refusals, and transformers itself."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastlm.lm import GPT, GPTConfig
from fastlm.lm.hf_layout import family_of, from_fields, to_fields

LLAMA = {"norm": "rms", "position": "rotary", "activation": "swiglu", "bias": False}
STYLES: dict[str, dict] = {
    "gpt2": {},
    "gpt2 untied": {"tie_weights": False, "activation": "relu_squared"},
    "llama": {**LLAMA, "n_kv_head": 1},
    "llama biased": {**LLAMA, "bias": True, "head_dim": 6, "tie_weights": False, "rope_theta": 5e2},
    "mistral": {**LLAMA, "n_kv_head": 1, "window": 3, "activation": "geglu"},
    "qwen3": {**LLAMA, "qk_norm": True, "tie_weights": False},
    "qwen3 window": {**LLAMA, "qk_norm": True, "window": 4},
    "own encoder": {"activation": "gelu", "causal": False, "post_norm": True},
    "own unbiased": {"bias": False},
}
SHAPE = {"vocab_size": 13, "block_size": 96, "n_layer": 2, "n_head": 2, "n_embd": 8, "n_inner": 20}
HUB = [name for name in STYLES if not name.startswith("own")]
GPT2_BLOCK = {  # linears are transposed: Conv1D holds (in, out)
    "ln_1.weight": (8,), "ln_1.bias": (8,), "ln_2.weight": (8,), "ln_2.bias": (8,),
    "attn.c_attn.weight": (8, 24), "attn.c_attn.bias": (24,),
    "attn.c_proj.weight": (8, 8), "attn.c_proj.bias": (8,),
    "mlp.c_fc.weight": (8, 20), "mlp.c_fc.bias": (20,),
    "mlp.c_proj.weight": (20, 8), "mlp.c_proj.bias": (8,),
}  # fmt: skip
GPT2_REST = {"wte.weight": (13, 8), "wpe.weight": (96, 8), "ln_f.weight": (8,), "ln_f.bias": (8,)}
LLAMA_BLOCK = {
    "input_layernorm.weight": (8,), "post_attention_layernorm.weight": (8,),
    "self_attn.q_proj.weight": (8, 8), "self_attn.k_proj.weight": (4, 8),
    "self_attn.v_proj.weight": (4, 8), "self_attn.o_proj.weight": (8, 8),
    "mlp.gate_proj.weight": (20, 8), "mlp.up_proj.weight": (20, 8),
    "mlp.down_proj.weight": (8, 20),
}  # fmt: skip


def model_of(style: str) -> GPT:
    torch.manual_seed(7)
    model = GPT(GPTConfig(**{**SHAPE, **STYLES[style]})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def assert_same(model: GPT, other: GPT) -> None:
    state, found = model.state_dict(), other.state_dict()
    assert state.keys() == found.keys()
    for name, value in state.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    assert torch.equal(model.cos, other.cos)


@pytest.mark.parametrize("style", STYLES)
def test_round_trip(style, tmp_path):
    model = model_of(style)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    found = GPT.from_pretrained(tmp_path)
    assert found.config == model.config
    assert not found.training
    assert all(p.requires_grad for p in found.parameters())
    assert (found.lm_head.weight is found.wte.weight) == model.config.tie_weights
    assert_same(model, found)


def test_names_and_shapes_of_gpt2(tmp_path):
    model_of("gpt2").save_pretrained(tmp_path)
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "model.safetensors").items()}
    want = {f"transformer.{name}": shape for name, shape in GPT2_REST.items()}
    for i in range(2):
        want |= {f"transformer.h.{i}.{name}": shape for name, shape in GPT2_BLOCK.items()}
    assert shapes == want
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architectures"] == ["GPT2LMHeadModel"]
    assert fields["torch_dtype"] == "float32"


def test_names_and_shapes_of_llama(tmp_path):
    model = model_of("llama")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    want = {"model.embed_tokens.weight": (13, 8), "model.norm.weight": (8,)}
    for i in range(2):
        want |= {f"model.layers.{i}.{name}": shape for name, shape in LLAMA_BLOCK.items()}
    assert {name: tuple(t.shape) for name, t in tensors.items()} == want
    k = tensors["model.layers.1.self_attn.k_proj.weight"]
    assert torch.equal(k, model.h[1].attn.c_attn.weight[8:12])
    up = tensors["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(up, model.h[0].mlp.c_fc.weight[20:])


@pytest.mark.parametrize("style", STYLES)
def test_family(style):
    want = "fastlm" if style.startswith("own") else style.split()[0]
    assert family_of(model_of(style).config) == want


def test_dtype_is_kept_or_chosen(tmp_path):
    model_of("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).wte.weight.dtype == torch.bfloat16
    assert GPT.from_pretrained(tmp_path, dtype=torch.float32).wte.weight.dtype == torch.float32


def test_shards_and_names_without_a_prefix(tmp_path):
    """As older GPT-2 folders are: two files, an index, a base model's names, buffers of masks."""
    model = model_of("gpt2")
    model.save_pretrained(tmp_path)
    whole = tmp_path / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(whole).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 96, 96)
    whole.unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(model, GPT.from_pretrained(tmp_path))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b\.safetensors must be a whole safetensors file"):
        GPT.from_pretrained(tmp_path)
    index["weight_map"]["x"] = "../b.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must name files beside it"):
        GPT.from_pretrained(tmp_path)


def test_fields_that_changed_since_win(tmp_path):
    """Someone else's edit of their fields makes our block stale."""
    fields = to_fields(model_of("llama").config)
    assert from_fields(fields).block_size == 96
    assert from_fields({**fields, "max_position_embeddings": 50}).block_size == 50


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    model = model_of("gpt2")
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def torn(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("fastlm.lm.hf.save_file", torn)
    with pytest.raises(OSError, match="no space"):
        model_of("llama").save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def damage_config(folder, **changes):
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v != "gone"}))


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def not_safetensors(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_a_tensor(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)


def with_another(folder):
    path = folder / "model.safetensors"
    save_file({**load_file(path), "model.rope.scale": torch.ones(1)}, path)


def of_two_dtypes(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (truncated, r"model\.safetensors must be a whole safetensors file"),
        (not_safetensors, r"model\.safetensors must be a whole safetensors file"),
        (pickled, r"pytorch_model\.bin is a pickle, which can run any code"),
        (without_a_tensor, r"another model than config\.json: lacks model\.norm\.weight"),
        (with_another, r"has model\.rope\.scale, which the model has not"),
        (of_two_dtypes, r"one dtype; got torch\.float16, torch\.float32"),
        (lambda f: (f / "model.safetensors").unlink(), r"must hold model\.safetensors"),
        (lambda f: (f / "config.json").unlink(), r"config\.json must be a JSON file"),
        (lambda f: (f / "config.json").write_text("[1]"), "must hold a JSON object; got list"),
        (lambda f: damage_config(f, model_type="bert"), "model_type must be one of .*; got 'bert'"),
        (
            lambda f: damage_config(f, hidden_size=16, head_dim=8),
            r"embed_tokens\.weight must have shape \(13, 16\) by config\.json; got \(13, 8\)",
        ),
        (
            lambda f: damage_config(f, rope_scaling={"rope_type": "llama3"}),
            r"config\.json: rotary angles must be unscaled; got rope_type 'llama3'",
        ),
        (
            lambda f: damage_config(f, hidden_act="mish"),
            "hidden_act must be one of silu, gelu; got 'mish'",
        ),
        (lambda f: damage_config(f, vocab_size="gone", fastlm="gone"), "vocab_size must be given"),
        (lambda f: damage_config(f, fastlm={"depth": 3}), "unknown field 'depth'"),
    ],
)
def test_refusals(harm, said, tmp_path):
    model_of("llama").save_pretrained(tmp_path)
    harm(tmp_path)
    with pytest.raises(ValueError, match=said):
        GPT.from_pretrained(tmp_path)


def test_names_are_not_downloaded():
    with pytest.raises(ValueError, match="gpt2 must be a folder that holds a model; nothing is"):
        GPT.from_pretrained("gpt2")


@pytest.mark.parametrize("style", HUB)
def test_transformers(style, tmp_path):
    """Both ways: logits, and 64 greedy tokens with and without a cache."""
    transformers = pytest.importorskip("transformers", reason="the peer is not installed")
    transformers.logging.set_verbosity_error()
    model = model_of(style)
    model.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(theirs).__name__ == json.loads((tmp_path / "ours/config.json").read_text())[
        "architectures"
    ][0]  # fmt: skip
    ids = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], theirs(ids).logits, rtol=1e-5, atol=1e-5)
    want = theirs.generate(ids, max_new_tokens=64, do_sample=False, pad_token_id=0).tolist()
    for cached in (True, False):
        found = model.generate(ids, 64, temperature=0, use_cache=cached)
        assert [row.tolist() for row in found] == want
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(model, GPT.from_pretrained(tmp_path / "theirs"))
