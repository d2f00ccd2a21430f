"""Generation: cached, ragged, forked, drafted, slid and stopped; always the same text."""

import copy
import functools
import subprocess
import sys

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fastlm.kernels import OPS
from fastlm.kernels._interpreter import interpreted
from fastlm.lm import GPT, GPTConfig, KVCache
from fastlm.lm.decode import Sampling, Step, agreed
from fastlm.lm.flat import flat_step, head
from fastlm.lm.growth import as_prompts
from fastlm.lm.lookup import Lookup
from fastlm.lm.lora import apply_lora
from fastlm.lm.stops import StopText
from fastlm.lm.tokenizer import ByteTokenizer

LLAMA = {"norm": "rms", "position": "rotary", "activation": "swiglu", "bias": False}
STYLES: dict[str, dict] = {
    "gpt2": {},
    "llama": {**LLAMA, "n_kv_head": 1},
    "window": {**LLAMA, "window": 5, "qk_norm": True},
}
SHAPE = {"vocab_size": 256, "block_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 16}
PROMPTS = [[1, 2, 3, 4, 5, 6], [7, 8], [9]]


@functools.cache
def model_of(style: str = "gpt2") -> GPT:
    torch.manual_seed(5)
    model = GPT(GPTConfig(**{**SHAPE, **STYLES[style]})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def texts(rows: list[torch.Tensor]) -> list[list[int]]:
    return [row.tolist() for row in rows]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0},
        {"seed": 3},
        {"seed": 3, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 0, "repetition_penalty": 1.5},
    ],
)
def test_cache_changes_nothing(style, how):
    model = model_of(style)
    cached = texts(model.generate(PROMPTS, 12, **how))
    assert cached == texts(model.generate(PROMPTS, 12, use_cache=False, **how))
    assert [len(row) for row in cached] == [18, 14, 13]
    assert [row[: len(p)] for row, p in zip(cached, PROMPTS, strict=True)] == PROMPTS


def test_greedy_is_the_likeliest_token():
    model = model_of()
    (row,) = model.generate(PROMPTS[0], 8, temperature=0)
    with torch.no_grad():
        likeliest = model(row[None, :-1])[0].argmax(-1)
    assert torch.equal(row[6:], likeliest[0, 5:])


def test_kernels_generate_the_same():
    model = model_of("llama")
    with interpreted():
        rows = texts(model.generate(PROMPTS, 3, temperature=0))
    assert rows == texts(model.generate(PROMPTS, 3, temperature=0))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_the_flat_step_is_the_model(style, dtype):
    """To the bit, past the window too, and in what it leaves in the cache."""
    model = copy.deepcopy(model_of(style)).to(dtype)
    cache = KVCache(model.config, 2, 24, dtype=dtype)
    model.hidden(torch.tensor([[1, 2, 3], [4, 5, 6]]), cache=cache)
    twin = copy.deepcopy(cache)
    step = flat_step(model, cache)
    for token in range(12):
        ids = torch.tensor([token, 2 * token])
        assert torch.equal(step(ids), model.hidden(ids[:, None], cache=twin)[:, 0])
    assert cache.lengths.tolist() == twin.lengths.tolist() == [15, 15]
    assert all(map(torch.equal, cache.k + cache.v, twin.k + twin.v))


@pytest.mark.parametrize("rows", [1, 2, 16, 17])
@pytest.mark.parametrize("bias", [False, True])
def test_the_head_of_few_rows_is_the_models(rows, bias):
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("tiny", n_layer=1, vocab_size=5003, bias=bias)).eval()
    x = torch.randn(rows, model.config.n_embd)
    torch.testing.assert_close(head(model)(x), model.lm_head(x))
    model.double()
    assert head(model) is model.lm_head
    model.float().lm_head.register_forward_hook(lambda *_: torch.zeros(1))
    assert head(model)(x).shape == (1,)


def test_the_flat_step_leaves_to_the_model_what_it_does_not_know():
    model = copy.deepcopy(model_of())
    cache = KVCache(model.config, 1, 24)
    assert flat_step(model, cache) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert flat_step(model, cache) is None
    with interpreted():
        assert flat_step(model, cache) is None
    assert flat_step(GPT(model.config, ops={"gelu": "eager"}), cache) is None
    hook = model.h[1].mlp.register_forward_hook(lambda *_: None)
    assert flat_step(model, cache) is None
    hook.remove()
    model.h[0].ln_1.double()
    assert flat_step(model, cache) is None
    assert flat_step(apply_lora(model.float(), 2, targets=["c_fc"]), cache) is None


@pytest.mark.parametrize("style", STYLES)
def test_a_row_depends_on_no_other(style):
    """In a ragged batch, alone, and as one of several continuations."""
    model = model_of(style)
    alone = [texts(model.generate(p, 10, seed=4))[0] for p in PROMPTS]
    assert texts(model.generate(PROMPTS, 10, seed=4)) == alone
    five = texts(model.generate(PROMPTS, 10, seed=4, num_return_sequences=5))
    assert five[::5] == alone
    assert len({tuple(row) for row in five}) == 15


def test_seeds():
    model = model_of()
    first = texts(model.generate(PROMPTS, 10, seed=1))
    assert first == texts(model.generate(PROMPTS, 10, seed=1))
    assert first != texts(model.generate(PROMPTS, 10, seed=2))
    torch.manual_seed(8)
    unseeded = texts(model.generate(PROMPTS, 10))
    assert unseeded != texts(model.generate(PROMPTS, 10))
    torch.manual_seed(8)
    assert unseeded == texts(model.generate(PROMPTS, 10))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("cached", [True, False])
def test_sliding_rows_equal_their_own_runs(style, cached):
    """Past the block each row goes on with its own last half block, whenever it gets there."""
    model, how = model_of(style), {"seed": 6, "slide": True, "use_cache": cached}
    alone = [texts(model.generate(p, 50, **how))[0] for p in PROMPTS]
    assert texts(model.generate(PROMPTS, 50, **how)) == alone
    row = alone[0]
    with torch.no_grad():  # the first token after the slide, from its last 12
        greedy = texts(model.generate(row[:24], 2, temperature=0, slide=True))[0]
        last = model(torch.tensor([greedy[:25]][0][-12:])[None])[0][0, -1].argmax()
    assert greedy[25] == last


def test_prompt_longer_than_the_block():
    model, long = model_of(), list(range(30))
    rows = model.generate(long, 4, temperature=0, slide=True)
    assert texts(rows) == texts(model.generate(long, 4, temperature=0, slide=True, use_cache=False))
    with pytest.raises(ValueError, match="must fit block_size, 24; got 30 and 4"):
        model.generate(long, 4)


@pytest.mark.parametrize("how", [{"temperature": 0}, {"seed": 2, "temperature": 0.3}])
@pytest.mark.parametrize("drafted", [1, 4])
def test_drafts_change_nothing(how, drafted):
    """Several rows that repeat themselves, past the block too."""
    model, prompts = model_of(), [[5, 6, 7, 5, 6, 7, 5, 6], [1, 2, 1, 2, 1], [9]]
    plain = texts(model.generate(prompts, 40, slide=True, **how))
    assert texts(model.generate(prompts, 40, slide=True, speculative=drafted, **how)) == plain


def test_right_drafts_are_taken(monkeypatch):
    """A model that repeats is asked less often than once a token."""
    model = model_of()
    prompt = texts(model.generate([1, 2, 3], 20, temperature=0))[0]
    calls = []
    hidden = GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda *a, **k: calls.append(1) or hidden(*a, **k))
    # The continuation is in the lookup already, as in an edited text.
    monkeypatch.setattr(Lookup, "draft", lambda self, n: prompt[len(self.tokens) :][:n])
    assert texts(model.generate([1, 2, 3], 20, temperature=0, speculative=4))[0] == prompt
    assert len(calls) == 1 + 4  # 19 tokens after the first, 5 at a time


def test_lookup():
    found = Lookup([1, 2, 3, 4, 9, 2, 3, 4])
    assert found.draft(2) == [9, 2]
    assert found.draft(9) == [9, 2, 3, 4]
    found.add([7])
    assert found.draft(3) == []
    found.add([9, 2])  # two tokens match where three do not
    assert found.draft(1) == [3]
    assert Lookup([]).draft(4) == []
    assert agreed([1, 2, 3], [1, 2, 4, 5]) == 2
    assert agreed([1], [1, 2]) == 1


def test_continuations_and_lengths():
    """Five texts of so many tokens in all, which Hugging Face's greedy default refuses."""
    model = model_of()
    rows = model.generate(torch.tensor([[1, 2, 3]]), max_length=20, num_return_sequences=5, seed=0)
    assert [len(row) for row in rows] == [20] * 5
    rows = model.generate(PROMPTS, max_length=10, seed=0)
    assert [len(row) for row in rows] == [10] * 3


def test_end_token_and_stop_string():
    model, bytes_ = model_of(), ByteTokenizer()
    whole = texts(model.generate(PROMPTS, 12, seed=9))
    end = whole[0][9]
    for row, full in zip(model.generate(PROMPTS, 12, seed=9, eos_token_id=end), whole, strict=True):
        new = full[len(PROMPTS[whole.index(full)]) :]
        want = new.index(end) + 1 if end in new else 12
        assert row.tolist() == full[: len(full) - 12 + want]
    ascii_only = model_of("llama")
    row = texts(ascii_only.generate([65], 20, seed=1))[0]
    text = bytes_.decode(row[1:])
    stop = text[4:6]
    (cut,) = ascii_only.generate([65], 20, seed=1, stop=[stop, "never"], tokenizer=bytes_)
    assert stop in bytes_.decode(cut[1:].tolist())
    assert stop not in bytes_.decode(cut[1:-1].tolist())
    assert cut.tolist() == row[: len(cut)]


def test_stop_text_across_pieces():
    def through(stops, *pieces):
        stop = StopText(stops)
        return "".join(map(stop.push, pieces)) + stop.finish(), stop.hit

    assert through(["END"], "a", "bE", "N", "D", "x") == ("ab", True)
    assert through(["END"], "aE", "Nd") == ("aENd", False)
    assert through(["xx", "ab"], "0xab") == ("0x", True)
    assert through([], "abc") == ("abc", False)
    assert StopText(["END"]).push("aEN") == "a"  # held back until it is certain


def test_stream_gives_each_token_at_once():
    model = model_of()
    stream = model.stream(PROMPTS[0], 10, seed=3)
    first = next(stream)
    assert [*PROMPTS[0], first, *stream] == texts(model.generate(PROMPTS[0], 10, seed=3))[0]
    with pytest.raises(
        ValueError, match="ids must be one prompt, continued once, to stream; got 3"
    ):
        next(model.stream(PROMPTS, 4))


def test_training_mode_is_given_back():
    model = GPT(GPTConfig(**SHAPE, dropout=0.5)).train()
    first = texts(model.generate(PROMPTS, 4, temperature=0))
    assert first == texts(model.generate(PROMPTS, 4, temperature=0))
    assert model.training


def test_a_step_is_static():
    """One traced step, replayed, is every step: what a CUDA graph needs, seen without a GPU."""
    sampling = Sampling(temperature=0.8, repetition_penalty=1.3, seed=5)

    def started() -> Step:
        model = GPT(model_of().config, {"flash_attention_decode": "eager", "sample": "eager"})
        model.load_state_dict(model_of().state_dict())
        step = Step(model.eval(), PROMPTS[1:], 1, sampling)
        step.cache = KVCache(model.config, 2, 24)
        step.cache.static = True
        with torch.no_grad():
            step.draw(model(torch.tensor([[7, 8], [9, 0]]), cache=step.cache)[0][:, -1])
        step.cache.cut([2, 1])
        return step

    called, replayed = started(), started()
    with torch.no_grad():
        before = [t.clone() for t in replayed.memory]
        graph = make_fx(lambda: replayed())()
        for t, value in zip(replayed.memory, before, strict=True):
            t.copy_(value)
        for _ in range(6):
            called()
            graph()
            assert torch.equal(called.token, replayed.token)
    assert replayed.cache.lengths.tolist() == [8, 7]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "one of max_new_tokens and max_length must be given; got both or neither"),
        ({"max_new_tokens": 3, "max_length": 9}, "must be given; got both"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"max_length": 2}, "max_length must be above the prompt's 6 tokens"),
        ({"max_new_tokens": 19}, "must fit block_size, 24; got 6 and 19"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
        ({"top_k": -1}, r"top_k must be 0 \(all\) or more"),
        ({"min_p": 1.5}, "min_p must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"num_return_sequences": 0}, "num_return_sequences must be at least 1"),
        (
            {"num_return_sequences": 5, "temperature": 0},
            "must be 1 with temperature 0, which gives the same text each time; got 5",
        ),
        ({"stop": "x"}, "tokenizer must be given beside stop"),
        ({"stop": "", "tokenizer": ByteTokenizer()}, "stop must hold no empty string"),
        ({"speculative": 2, "repetition_penalty": 2.0}, "speculative must be 0 with a"),
    ],
)
def test_refusals(options, said):
    if options and "max_new_tokens" not in options and "max_length" not in options:
        options = {"max_new_tokens": 4, **options}
    with pytest.raises(ValueError, match=said):
        model_of().generate(PROMPTS[0], **options)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([], "ids must hold at least one prompt"),
        ([[1], []], "at least one token a prompt"),
        ([256], "ids must be tokens below vocab_size, 256; got 256"),
        ([[-1]], "tokens below vocab_size"),
        (torch.ones(1, 2), r"ids must be \(B, T\) integers; got torch.float32 \(1, 2\)"),
        ("text", "at least one token a prompt; got 't'"),
    ],
)
def test_bad_prompts(ids, said):
    with pytest.raises(ValueError, match=said):
        as_prompts(ids, 256)


def test_encoder_is_refused():
    model = GPT(GPTConfig(**SHAPE, causal=False))
    with pytest.raises(ValueError, match="model must be causal; got an encoder"):
        model.generate([1], 3)


def run(*words: str, text: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", "-m", "fastlm", "generate", *words]
    return subprocess.run(command, input=text.encode(), capture_output=True, check=False)


def test_command_line(tmp_path, capsys, monkeypatch):
    """In this process, once in another: what is printed, and where."""
    from fastlm.__main__ import main

    model_of().save_pretrained(tmp_path)
    usual = ["generate", "--checkpoint", str(tmp_path), "--prompt", "def ", "--seed", "3"]
    assert main([*usual, "--max-new-tokens", "40"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("def ")
    assert "40 tokens in" in said.err
    assert "outgrew the model's 24 tokens" in said.err
    assert main([*usual, "--max-length", "12", "--num-samples", "2"]) == 0
    several = capsys.readouterr().out
    assert several.startswith("--- sample 1 of 2 ---\ndef ")
    assert main([*usual, "--max-new-tokens", "40", "--no-slide"]) == 2
    assert "must fit block_size, 24" in capsys.readouterr().err
    assert main(["generate", "--checkpoint", str(tmp_path / "none")]) == 2
    assert "must be a folder that holds a model" in capsys.readouterr().err
    other = run(
        "--checkpoint", str(tmp_path), "--prompt", "-", "--seed", "3", "--max-length", "12",
        text="def ",
    )  # fmt: skip
    assert other.returncode == 0, other.stderr
    first = several.split("--- sample 2 of 2 ---")[0].removeprefix("--- sample 1 of 2 ---\n")
    assert other.stdout.decode() == first


def test_noise_drawn_ahead_is_the_same():
    """Offsets within a group and across its end, one seed and several, and ragged offsets."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    op = OPS["sample"]
    for seed in (torch.tensor([4, 5, 6]), 7):
        for offset in (0, 1, 15, 16, 33, torch.tensor([3, 40, 17])):
            asked = {"seed": seed, "offset": offset, "top_k": 20}
            assert torch.equal(op.fused(logits, **asked), op.reference(logits, **asked))
