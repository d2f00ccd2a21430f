"""Attention's options: each alone, every pair, random triples; and what each one promises."""

import itertools
import math
import re

import pytest
import torch
from harness import assert_bitwise_equal, check, outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_check import interp_check

from fastlm.kernels import OPS, flash_attention
from fastlm.kernels._interpreter import interpreted
from fastlm.kernels.attention import _scores, _tiles
from fastlm.kernels.attention.eager import visible

pytestmark = pytest.mark.usefixtures("kernels")
CPU = torch.device("cpu")
OP = OPS["flash_attention"]


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).requires_grad_()


B, S_Q, S_K, H, H_KV = 2, 21, 37, 2, 1

OPTIONS = {
    "causal": lambda dtype: {"causal": True},
    "window": lambda dtype: {"window_size": (7, 3)},
    "left window": lambda dtype: {"window_size": (4, -1)},
    "softcap": lambda dtype: {"softcap": 2.0},
    "alibi": lambda dtype: {"alibi_slopes": torch.tensor([[0.5, 0.1], [0.2, 0.3]])},
    "bias": lambda dtype: {"bias": leaf(B, H, S_Q, S_K, dtype=dtype)},
    "mask": lambda dtype: {"bias": torch.rand(1, 1, S_Q, S_K) < 0.6},
    "sinks": lambda dtype: {"sinks": leaf(H, dtype=dtype)},
    "dropout": lambda dtype: {"dropout_p": 0.3, "dropout_seed": 12345},
    "lse": lambda dtype: {"return_lse": True},
    "wide v": lambda dtype: {"v": leaf(B, S_K, H_KV, 40, dtype=dtype)},
}
PAIRS = [
    pytest.param(pair, id="+".join(pair))
    for pair in itertools.combinations(OPTIONS, 2)
    if set(pair) not in ({"window", "left window"}, {"bias", "mask"})
]


def example(options, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    given = OP.example(dtype, CPU, B=B, S_q=S_Q, S_k=S_K, H=H, H_kv=H_KV, D=16)
    for name in options:
        given |= OPTIONS[name](dtype)
    return given


@pytest.mark.parametrize("dtype", OP.dtypes)
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option(option, dtype):
    check(OP, example([option], dtype))


@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair(pair):
    check(OP, example(pair))


@settings(max_examples=16, deadline=None, derandomize=True, database=None)
@given(st.sets(st.sampled_from(list(OPTIONS)), min_size=3, max_size=3), st.sampled_from(OP.dtypes))
def test_random_triples(options, dtype):
    with interpreted():
        check(OP, example(sorted(options), dtype))


@pytest.mark.parametrize("option", OPTIONS)
def test_memory(option):
    """No access outside a tensor, no two programs on one element; the same bits twice."""
    given = example([option, "lse"], torch.bfloat16)
    with interp_check():
        got = outcome(flash_attention, given)
    assert_bitwise_equal(got, outcome(flash_attention, given))


# --- windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "window", [(0, 0), (5, 0), (0, 5), (3, 40), (40, 3), (17, 2), (-1, 4), (60, 60)]
)
@pytest.mark.parametrize(("S_q", "S_k"), [(40, 40), (20, 50), (50, 20), (1, 33)])
def test_window_bounds_are_inclusive(S_q, S_k, window):
    q, k = torch.zeros(1, S_q, 1, S_k), torch.zeros(1, S_k, 1, S_k)
    v = torch.eye(S_k)[None, :, None, :]
    seen = flash_attention(q, k, v, window_size=window)[0, :, 0] > 0
    shift = S_k - S_q
    i, j = torch.arange(S_q)[:, None] + shift, torch.arange(S_k)
    want = torch.ones(S_q, S_k, dtype=torch.bool)
    if window[0] >= 0:
        want &= j >= i - window[0]
    if window[1] >= 0:
        want &= j <= i + window[1]
    assert torch.equal(seen, want)


@pytest.mark.parametrize("window", [(5, 0), (2, 9), (33, 33)])
@pytest.mark.parametrize(("S_q", "S_k"), [(70, 70), (40, 90), (90, 40)])
def test_windows_by_the_contract(S_q, S_k, window):
    torch.manual_seed(0)
    given = OP.example(torch.float32, CPU, B=1, S_q=S_q, S_k=S_k, H=1, H_kv=1, D=16)
    check(OP, given | {"window_size": window, "return_lse": True})


def test_the_cost_is_proportional_to_the_window(monkeypatch):
    """Tile products that the kernels make, forward and backward: a row of tiles sees 3 or fewer."""
    from triton.runtime.interpreter import InterpreterBuilder

    products = 0
    plain = InterpreterBuilder.create_dot

    def counted(*args):
        nonlocal products
        products += 1
        return plain(*args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)

    def cost(S):
        nonlocal products
        products = 0
        flash_attention(*(leaf(1, S, 1, 16) for _ in "qkv"), window_size=(15, 0)).sum().backward()
        return products

    small, large = cost(128), cost(512)
    assert large <= 4.5 * small


# --- sinks --------------------------------------------------------------------------------------


def test_a_row_that_sees_only_the_sink():
    sinks = torch.tensor([0.7])
    q, k, v = leaf(1, 40, 1, 16), leaf(1, 8, 1, 16), leaf(1, 8, 1, 16)
    o, lse = flash_attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    assert (o[:, :32] == 0).all()
    torch.testing.assert_close(lse[0, 0, :32], torch.full((32,), 0.7))


def test_sinks_of_minus_infinity_change_nothing():
    given = example(["causal", "lse"])
    sinks = torch.full((H,), -math.inf)
    for got, want in zip(
        flash_attention(**given, sinks=sinks), flash_attention(**given), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sinks_in_float32_beside_half_precision(dtype, seed):
    check(OP, example(["causal", "lse"], dtype, seed) | {"sinks": leaf(H)})


def test_sinks_without_keys():
    sinks = leaf(2)
    q, k = leaf(1, 5, 2, 16), leaf(1, 0, 2, 16)
    o, lse = flash_attention(q, k, k, sinks=sinks, return_lse=True)
    assert (o == 0).all()
    lse.sum().backward()
    torch.testing.assert_close(sinks.grad, torch.full((2,), 5.0))


# --- bias ---------------------------------------------------------------------------------------

SHAPES = [
    (S_Q, S_K), (S_Q, 1), (H, S_Q, S_K), (1, H, 1, S_K), (B, 1, S_Q, S_K), (B, H, 1, 1), (S_K,), (),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_bias_gradients_sum_over_what_repeats(shape):
    check(OP, example(["causal", "lse"]) | {"bias": leaf(*shape)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bias_of_its_own_dtype(dtype):
    given = example([], torch.bfloat16) | {"bias": leaf(H, S_Q, S_K, dtype=dtype)}
    grads = outcome(flash_attention, given)
    assert grads["gradient of ['bias']"].dtype == dtype


def test_bias_of_any_strides():
    given = example(["lse"])
    bias = torch.randn(S_K, S_Q, H).permute(2, 1, 0)
    want = flash_attention(**given, bias=bias.contiguous())
    for got, wanted in zip(flash_attention(**given, bias=bias), want, strict=True):
        assert torch.equal(got, wanted)


def test_rows_that_a_bias_hides_whole():
    bias = torch.zeros(S_Q, S_K)
    bias[3:9] = -math.inf
    given = example(["lse"]) | {"bias": bias.requires_grad_()}
    o, lse = flash_attention(**given)
    o.sum().backward()
    assert (o[:, 3:9] == 0).all()
    assert (lse[:, :, 3:9] == -math.inf).all()
    assert all(given[n].grad.isfinite().all() for n in ("q", "k", "v", "bias"))


# --- softcap ------------------------------------------------------------------------------------


def test_scores_reach_the_cap():
    given = example(["softcap", "lse"])
    with torch.no_grad():
        given["q"] *= 20
    check(OP, given)


@pytest.mark.parametrize("softcap", [0.5, 30.0, 1e4])
def test_softcaps(softcap):
    check(OP, example(["causal", "lse"]) | {"softcap": softcap})


# --- dropout ------------------------------------------------------------------------------------


def dropout_mask(seed, p, B, H, S_q, S_k):
    head = torch.arange(B * H).view(B, H, 1, 1)
    i, j = torch.arange(S_q)[:, None], torch.arange(S_k)
    return _scores.dropout_mask(torch.tensor(seed), p, head, i, j)


@pytest.mark.parametrize("tile", [(32, 16), (16, 64)])
def test_dropout_drops_what_the_mask_says(monkeypatch, tile):
    """Where q is 0 weights are equal; v = I shows them. The size of the tiles changes nothing."""
    monkeypatch.setitem(_tiles._INTERPRETED, "forward", _tiles.Tile(*tile, 4, 1))
    S, p = 40, 0.4
    q, v = torch.zeros(2, S, 3, S), torch.eye(S)[None, :, None, :].expand(2, S, 3, S)
    o = flash_attention(q, q, v, dropout_p=p, dropout_seed=7)
    keep = dropout_mask(7, p, 2, 3, S, S)
    torch.testing.assert_close(o.transpose(1, 2), keep / (S * (1 - p)))
    assert abs(keep.double().mean() - (1 - p)) < 0.02


def test_dropout_is_repeated_by_its_seed_alone():
    given = example([]) | {"dropout_p": 0.5}
    with torch.no_grad():
        first = flash_attention(**given, dropout_seed=1)
        assert torch.equal(first, flash_attention(**given, dropout_seed=torch.tensor(1)))
        assert not torch.equal(first, flash_attention(**given, dropout_seed=2))
        torch.manual_seed(3)
        drawn = flash_attention(**given)
        assert not torch.equal(drawn, flash_attention(**given))
        torch.manual_seed(3)
        assert torch.equal(drawn, flash_attention(**given))


def test_dropout_under_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    given = example([]) | {"dropout_p": 0.5}
    grads = []
    for wrap in (False, True):
        torch.manual_seed(5)
        for n in "qkv":
            given[n].grad = None

        def run(q, k, v):
            return flash_attention(q, k, v, dropout_p=0.5)

        args = [given[n] for n in "qkv"]
        o = checkpoint(run, *args, use_reentrant=False) if wrap else run(*args)
        o.sum().backward()
        grads.append([t.grad.clone() for t in args])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_64_bit_seed_uses_both_halves():
    low = dropout_mask(1, 0.5, 1, 1, 8, 64)
    high = dropout_mask(1 + (1 << 32), 0.5, 1, 1, 8, 64)
    assert not torch.equal(low, high)


# --- block masks --------------------------------------------------------------------------------

BLOCKS = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)[None, None]
BY_HEAD = torch.stack([BLOCKS[0, 0], BLOCKS[0, 0].T.logical_not()])[None]


@pytest.fixture
def wide_tiles(monkeypatch):
    """Fewer, larger tiles than other tests have, two or more to a block of 128 all the same."""
    tiles = {"forward": (64, 32), "dkdv": (32, 64), "dq": (64, 32)}
    for kernel, (m, n) in tiles.items():
        monkeypatch.setitem(_tiles._INTERPRETED, kernel, _tiles.Tile(m, n, 4, 1))


def blocked(block_mask, dtype=torch.float32, **options):
    torch.manual_seed(0)
    given = OP.example(dtype, CPU, B=1, S_q=300, S_k=270, H=2, H_kv=1, D=16, **options)
    return given | {"block_mask": block_mask, "return_lse": True}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (140, 20)},
        {"bias": (300, 1), "sinks": True},
    ],
    ids=["plain", "causal", "window", "bias and sinks"],
)
@pytest.mark.parametrize("mask", [BLOCKS, BY_HEAD], ids=["shared", "by head"])
def test_block_masks(wide_tiles, mask, options):
    check(OP, blocked(mask, **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_block_masks_in_half_precision(wide_tiles, dtype):
    check(OP, blocked(BLOCKS, dtype))


def test_memory_of_block_masks(wide_tiles):
    given = blocked(BLOCKS, causal=True)
    with interp_check():
        got = outcome(flash_attention, given)
    assert_bitwise_equal(got, outcome(flash_attention, given))


def test_hidden_blocks_are_never_read(wide_tiles):
    """NaN in keys that every block hides reaches nothing, and their tiles cost nothing."""
    given = blocked(torch.tensor([[1, 0, 1]] * 3, dtype=torch.bool)[None, None])
    poisoned = dict(given)
    for name in "kv":
        hidden = given[name].detach().clone()
        hidden[:, 128:256] = math.nan
        poisoned[name] = hidden.requires_grad_()
    o, lse = flash_attention(**poisoned)
    want = flash_attention(**given)
    assert torch.equal(o, want[0])
    assert torch.equal(lse, want[1])
    o.sum().backward()
    assert poisoned["q"].grad.isfinite().all()
    assert (poisoned["k"].grad[:, 128:256] == 0).all()


def test_flex_attentions_block_mask_is_one(wide_tiles):
    from torch.nn.attention.flex_attention import create_block_mask

    def far(b, h, i, j):
        return (i - j).abs() // 128 != 1

    mask = create_block_mask(far, 1, 1, 300, 270, device="cpu", BLOCK_SIZE=128)
    check(OP, blocked(mask.to_dense().bool()))


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": (-2, 0)}, r"window_size must be .*; got \(-2, 0\)"),
        ({"softcap": -1.0}, "softcap must be 0 .none. or positive; got -1.0"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\); got 1.0"),
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes must be \(2,\) or \(2, 2\); got \(3,\)"),
        ({"sinks": torch.ones(1)}, r"sinks must be \(2,\); got \(1,\)"),
        (
            {"block_mask": torch.ones(1, 1, 1, 2, dtype=torch.bool)},
            "block_mask must be bool .2, 2, 1, 1.",
        ),
        ({"block_mask": torch.ones(1, 1, 1, 1)}, "block_mask must be bool .*; got torch.float32"),
        ({"bias": torch.ones(3, S_K)}, r"bias must broadcast to \(2, 2, 21, 37\); got \(3, 37\)"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=f"flash_attention: {message}"):
        flash_attention(**example([]) | change)


def test_slopes_that_want_a_gradient_run_pytorch():
    slopes = torch.tensor([0.5, 0.1], requires_grad=True)
    flash_attention(**example([]), alibi_slopes=slopes).sum().backward()
    assert slopes.grad.abs().sum() > 0


def test_visible_is_the_band():
    assert visible(2, 4, 0, 1, CPU).tolist() == [
        [True, True, False, False],
        [False, True, True, False],
    ]


# --- the documentation --------------------------------------------------------------------------


def drawings():
    from pathlib import Path

    text = (Path(__file__).parent.parent / "docs" / "attention.md").read_text()
    found = re.findall(r"^`(S_q=[^`]*)`[^\n]*\n\n```\n([#.\n]+)```", text, re.MULTILINE)
    return [pytest.param(*drawing, id=drawing[0]) for drawing in found]


@pytest.mark.parametrize(("options", "drawing"), drawings())
def test_the_drawn_masks_are_the_kernels(options, drawing):
    options = eval(f"dict({options})")  # the file is ours
    S_q, S_k = options.pop("S_q"), options.pop("S_k")
    q, v = torch.zeros(1, S_q, 1, S_k), torch.eye(S_k)[None, :, None, :]
    seen = flash_attention(q, torch.zeros_like(v), v, **options)[0, :, 0] > 0
    assert seen.tolist() == [[c == "#" for c in row] for row in drawing.split()]


def test_every_drawing_is_read():
    assert len(drawings()) == 6
