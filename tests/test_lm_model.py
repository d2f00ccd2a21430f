"""The model: fused against eager and float64, behind a cache, packed, and its refusals."""

import functools

import pytest
import torch
from harness import assert_within_contract
from torch import Tensor

from fastlm.kernels import OPS
from fastlm.kernels._interpreter import interpreted
from fastlm.lm import GPT, GPTConfig, KVCache

LLAMA = {"norm": "rms", "position": "rotary", "activation": "swiglu", "bias": False}
STYLES: dict[str, dict] = {
    "gpt2": {},
    "llama": {**LLAMA, "n_kv_head": 1, "tie_weights": False},
    "qwen": {**LLAMA, "n_kv_head": 1, "qk_norm": True, "head_dim": 6},
    "window": {**LLAMA, "window": 2, "activation": "geglu"},
    "squared": {"activation": "relu_squared", "position": "none", "bias": False},
    "encoder": {"activation": "gelu", "causal": False, "post_norm": True},
}
CAUSAL = [name for name in STYLES if name != "encoder"]
SHAPE = {"vocab_size": 13, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 8}


@functools.cache
def model_of(style: str, ops: str = "fused", dtype: torch.dtype = torch.float32) -> GPT:
    """The same random model whatever the ops and the dtype."""
    torch.manual_seed(7)
    model = GPT(GPTConfig(**{**SHAPE, **STYLES[style]}), ops).eval()
    with torch.no_grad():
        for p in model.parameters():  # at its initialisation every branch is close to nothing
            p += 0.2 * torch.randn_like(p)
    return model.to(dtype)


def random_ids(*shape: int) -> Tensor:
    return torch.randint(SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(3))


def learned(model: GPT, ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Logits, loss, and the gradient of every parameter."""
    model.zero_grad()
    logits, _ = model(ids)
    _, loss = model(ids, targets)
    loss.backward()
    grads = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return {"logits": logits.detach(), "loss": loss.detach(), **grads}


@pytest.mark.parametrize("style", STYLES)
def test_kernels_equal_eager(style):
    """Logits, loss and gradients, each as near to float64 as eager PyTorch is."""
    ids, targets = random_ids(2, 5), random_ids(2, 5).roll(1, 1)
    targets[0, 1] = -100
    eager = learned(model_of(style, "eager"), ids, targets)
    exact = learned(model_of(style, "eager", torch.float64), ids, targets)
    assert_within_contract(learned(model_of(style), ids, targets), eager, exact)
    with interpreted():
        assert_within_contract(learned(model_of(style), ids, targets), eager, exact)


def through_cache(model: GPT, ids: Tensor, pieces: tuple[int, ...]) -> Tensor:
    """Logits of all tokens, computed a piece at a time."""
    cache = KVCache(model.config, ids.shape[0], ids.shape[1], dtype=model.wte.weight.dtype)
    with torch.inference_mode():
        found = [model(piece, cache=cache)[0] for piece in ids.split(pieces, 1)]
    assert cache.lengths.tolist() == [ids.shape[1]] * ids.shape[0]
    return torch.cat(found, 1)


@pytest.mark.parametrize("how", ["torch", "kernels"])
@pytest.mark.parametrize("style", CAUSAL)
def test_cached_equals_uncached(style, how):
    ids = random_ids(2, 8)
    with torch.no_grad():
        eager = {"logits": model_of(style, "eager")(ids)[0]}
        exact = {"logits": model_of(style, "eager", torch.float64)(ids)[0]}
    if how == "torch":
        found = through_cache(model_of(style), ids, (4, 1, 2, 1))
    else:
        with interpreted():
            found = through_cache(model_of(style), ids, (5, 1, 2))
    assert_within_contract({"logits": found}, eager, exact)


@pytest.mark.parametrize("style", ["gpt2", "window"])
def test_cache_of_ragged_sequences(style):
    """Padding on the right, forgotten by a cut, is never seen again."""
    model, lengths = model_of(style), [6, 3, 1]
    ids, more = random_ids(3, 6), random_ids(3, 2)
    cache = KVCache(model.config, 3, 8)
    with torch.inference_mode():
        model(ids, cache=cache)
        cache.cut(lengths)
        found = torch.cat([model(piece, cache=cache)[0] for piece in more.split(1, 1)], 1)
        for row, n in enumerate(lengths):
            alone = model(torch.cat((ids[row, :n], more[row]))[None])[0][0, n:]
            torch.testing.assert_close(found[row], alone, rtol=1e-5, atol=1e-5)


def test_fork_repeats_each_sequence():
    model, ids = model_of("llama"), random_ids(2, 4)
    cache = KVCache(model.config, 2, 5)
    with torch.inference_mode():
        model(ids, cache=cache)
        more = random_ids(6, 1)
        found = model(more, cache=cache.fork(3))[0]
        whole = torch.cat((ids.repeat_interleave(3, 0), more), 1)
        torch.testing.assert_close(found, model(whole)[0][:, -1:], rtol=1e-5, atol=1e-5)


def test_cache_is_full():
    model = model_of("gpt2")
    cache = KVCache(model.config, 1, 3)
    with torch.inference_mode(), pytest.raises(ValueError, match="capacity must be at least 4"):
        model(random_ids(1, 4), cache=cache)


@pytest.mark.parametrize("how", ["torch", "kernels"])
@pytest.mark.parametrize("style", ["gpt2", "qwen", "encoder"])
def test_packed_equals_separate(style, how):
    model, lengths = model_of(style), (3, 1, 5)
    ids = random_ids(sum(lengths))
    ends = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    with torch.no_grad():
        alone = torch.cat([model(piece[None])[0][0] for piece in ids.split(lengths)])
        if how == "torch":
            packed = model(ids, cu_seqlens=ends)[0]
        else:
            with interpreted():
                packed = model(ids, cu_seqlens=ends)[0]
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_recomputed_blocks_give_the_same_gradients():
    ids, targets = random_ids(2, 5), random_ids(2, 5)
    model = GPT(model_of("llama").config).train()
    kept = learned(model, ids, targets)
    kept = {name: t.clone() for name, t in kept.items()}
    model.checkpoint_activations = True
    for name, t in learned(model, ids, targets).items():
        assert torch.equal(t, kept[name]), name


def test_ops_by_name():
    model = GPT(GPTConfig(**SHAPE), ops={"layer_norm": "eager", "gelu": "fused"})
    assert model.ops.layer_norm is OPS["layer_norm"].reference
    assert model.ops.gelu is OPS["gelu"].fused
    assert model.ops.flash_attention is OPS["flash_attention"].fused
    assert GPT(GPTConfig(**SHAPE), ops="eager").ops.gelu is OPS["gelu"].reference


@pytest.mark.parametrize(
    ("ops", "said"),
    [
        ({"attention": "eager"}, "ops must name ops of .*flash_attention.*; got 'attention'"),
        ({"gelu": "triton"}, "ops must be 'fused' or 'eager' for gelu; got 'triton'"),
        ("both", "ops must be 'fused' or 'eager'"),
    ],
)
def test_unknown_ops(ops, said):
    with pytest.raises(ValueError, match=said):
        GPT(GPTConfig(**SHAPE), ops)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1; got 0"),
        ({"n_head": 3}, "n_head must divide n_embd, 8; got 3"),
        ({"n_kv_head": 3}, "n_kv_head must divide n_head, 2; got 3"),
        ({"position": "rotary", "head_dim": 3}, "head_dim must be even"),
        ({"norm": "batch"}, "norm must be one of layer, rms; got 'batch'"),
        ({"activation": "silu"}, "activation must be one of gelu, .*; got 'silu'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
        ({"window": -1}, "window must be 0 or more; got -1"),
    ],
)
def test_bad_config(fields, said):
    with pytest.raises(ValueError, match=said):
        GPTConfig(**{**SHAPE, **fields})


def test_config_as_data():
    config = GPTConfig.preset("llama-tiny", window=7)
    assert GPTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown field 'layers'"):
        GPTConfig.from_dict({"layers": 3})
    with pytest.raises(ValueError, match=r"preset must be one of tiny, .*; got 'huge'"):
        GPTConfig.preset("huge")


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.zeros(3, dtype=torch.int64), r"ids must be \(B, T\) int64 or int32"),
        (torch.zeros(1, 3), "ids must be .*; got torch.float32"),
        (torch.zeros(1, 13, dtype=torch.int64), "must end within block_size, 12 .*; got 13"),
    ],
)
def test_bad_ids(ids, said):
    with pytest.raises(ValueError, match=said):
        model_of("gpt2")(ids)
