"""Decoding over a cache: contiguous and paged, split and whole; and merging partial results."""

import itertools
import math

import pytest
import torch
from harness import assert_bitwise_equal, assert_within_contract, check, clones, doubled, outcome
from memory_check import interp_check

from fastlm.kernels import (
    OPS,
    explain,
    flash_attention,
    flash_attention_decode,
    merge_attention,
)
from fastlm.kernels._dispatch import cpu_runner

pytestmark = pytest.mark.usefixtures("kernels")
CPU = torch.device("cpu")
OP = OPS["flash_attention_decode"]


def example(dtype=torch.float32, **size):
    torch.manual_seed(0)
    usual = {"lengths": (100, 0, 37, 64), "S_q": 1, "S": 112, "H": 4, "H_kv": 2, "D": 16}
    return OP.example(dtype, CPU, **(usual | {"return_lse": True} | size))


OPTIONS = {
    "plain": {},
    "new tokens": {"S_q": 5},
    "not causal": {"S_q": 5, "causal": False},
    "window": {"S_q": 3, "window_size": (20, 0)},
    "softcap": {"softcap": 2.0},
    "alibi": {"S_q": 3, "alibi_slopes": torch.tensor([0.5, 0.1, 0.2, 0.3])},
    "sinks": {"sinks": torch.tensor([0.5, 3.0, -1.0, -math.inf])},
    "many heads": {"H": 24, "H_kv": 2},
    "many rows": {"S_q": 17, "H": 4, "H_kv": 1},
    "odd D": {"D": 20},
    "scale": {"softmax_scale": -0.3},
}


@pytest.mark.parametrize("page", [0, 16, 32])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option(option, splits, page):
    check(OP, example(page=page, num_splits=splits, **OPTIONS[option]))


@pytest.mark.parametrize("dtype", OP.dtypes)
@pytest.mark.parametrize("page", [0, 64])
def test_dtypes(dtype, page):
    check(OP, example(dtype, page=page, num_splits=2, S_q=2))


def test_equals_flash_attention():
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 60, 2, 16), torch.randn(2, 60, 2, 16)
    o = flash_attention_decode(q, k, v, cache_seqlens=torch.tensor([60, 60]), window_size=(30, -1))
    want = flash_attention(q, k, v, causal=True, window_size=(30, -1))
    torch.testing.assert_close(o, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("page", [0, 16, 64])
def test_nan_past_the_end_is_never_read(page):
    given = example(page=page, num_splits=2)
    poisoned = clones(given)
    if page:
        used = torch.zeros(given["k_cache"].shape[:2], dtype=torch.bool)
        for row, n in zip(given["block_table"], given["cache_seqlens"], strict=True):
            for j in range(int(n)):
                used[row[j // page], j % page] = True
            row[-(-int(n) // page) :] = 2**30  # a page that is not there
    else:
        used = torch.arange(112) < given["cache_seqlens"][:, None]
    for name in ("k_cache", "v_cache"):
        poisoned[name][~used] = math.nan
    if page:
        poisoned["block_table"] = given["block_table"]
    with interp_check():
        got = outcome(flash_attention_decode, poisoned)
    want = outcome(flash_attention_decode, given)
    for name in ("result[0]", "result[1]"):
        assert torch.equal(got[name], want[name])


@pytest.mark.parametrize("page", [16, 64])
def test_a_page_number_out_of_range_hides_its_tokens(page):
    given = example(page=page)
    given["block_table"][0, 1] = 10**6
    given["block_table"][2, 0] = -1
    with interp_check():
        check(OP, given)


@pytest.fixture
def lazy_memory(nan_in_fresh_memory):
    """torch.empty leaves pages untouched, so that a tensor may be larger than the machine."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("paged", [True, False])
def test_offsets_past_2_to_the_31(lazy_memory, paged):
    """Between pages, and between the caches of two sequences."""
    torch.manual_seed(0)
    far = torch.empty(2**31 + 2**10, dtype=torch.int8)
    far = far.as_strided((2, 16, 1, 16), (2**31, 16, 16, 1))
    far.copy_(torch.randint(-100, 100, far.shape))
    given = {"cache_seqlens": torch.tensor([16, 13]), "k_scale": 0.01, "v_scale": 0.01}
    if paged:
        given = given | {"block_table": torch.tensor([[1, 0], [0, 1]], dtype=torch.int32)}
        given["cache_seqlens"] = torch.tensor([32, 29])
    q = torch.randn(2, 1, 2, 16)
    near = far.contiguous()
    assert torch.equal(
        flash_attention_decode(q, far, far, **given), flash_attention_decode(q, near, near, **given)
    )


def test_memory():
    given = example(torch.float16, page=16, num_splits=3, S_q=2)
    with interp_check():
        got = outcome(flash_attention_decode, given)
    assert_bitwise_equal(got, outcome(flash_attention_decode, given))


def test_one_split_does_not_depend_on_the_batch():
    given = example(num_splits=1)
    o, lse = flash_attention_decode(**given)
    alone = {n: v[2:3] if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    o_alone, lse_alone = flash_attention_decode(**alone)
    assert torch.equal(o[2:3], o_alone)
    assert torch.equal(lse[2:3], lse_alone)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("page", [0, 16])
def test_quantised_caches(dtype, page):
    """The reference reads the same quantised values: only the arithmetic after them may differ."""
    given = example(torch.bfloat16, page=page, num_splits=2)
    for name in ("k_cache", "v_cache"):
        wide = given[name].float()
        given[name] = (
            (wide * 30).round().clamp(-127, 127).to(dtype)
            if dtype == torch.int8
            else wide.to(dtype)
        )
    step = 1 / 30 if dtype == torch.int8 else 1.0
    given |= {"k_scale": torch.tensor([step, 2 * step]), "v_scale": step}
    exact = {n: t.float() if n in ("k_cache", "v_cache") else t for n, t in given.items()}
    assert_within_contract(
        outcome(flash_attention_decode, given)
        | {"['k_cache'] after": torch.empty(0), "['v_cache'] after": torch.empty(0)},
        outcome(OP.reference, given)
        | {"['k_cache'] after": torch.empty(0), "['v_cache'] after": torch.empty(0)},
        outcome(OP.reference, doubled(exact))
        | {"['k_cache'] after": torch.empty(0), "['v_cache'] after": torch.empty(0)},
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(4, 1, 16)}, "q must have 4 dimensions"),
        ({"k_cache": torch.randn(4, 112, 3, 16)}, "k_cache must be .* with H_kv a divisor of 4"),
        ({"v_cache": torch.randn(4, 111, 2, 16)}, "v_cache must be"),
        ({"cache_seqlens": torch.tensor([1, 2])}, r"cache_seqlens must be \(4,\) int32 or int64"),
        ({"k_cache": torch.randn(4, 112, 2, 16).half()}, "must have q's dtype"),
        (
            {"q": torch.randn(3, 1, 4, 16), "cache_seqlens": torch.tensor([1, 2, 3])},
            "batch, 3, without",
        ),
        (
            {"block_table": torch.zeros(3, 1, dtype=torch.int32)},
            r"block_table must be \(4, pages\)",
        ),
        ({"block_table": torch.zeros(4, 1, dtype=torch.int32)}, "power of two from 16 on; got 112"),
        ({"num_splits": 65}, r"num_splits must be 0 \(chosen\) to 64; got 65"),
        ({"window_size": (-3, 0)}, "window_size must be"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=f"flash_attention_decode: .*{message}"):
        flash_attention_decode(**example() | change)


def test_explain():
    assert "interpreter" in explain(flash_attention_decode, **example())


# --- merging ------------------------------------------------------------------------------------


def leaf(*shape):
    return torch.randn(shape).requires_grad_()


@pytest.mark.parametrize("cuts", [(30,), (7, 7, 29), (0, 50)])
def test_merged_parts_are_the_whole(cuts):
    """Values, lse and gradients, empty parts among them."""
    torch.manual_seed(0)
    whole = {"q": leaf(2, 9, 2, 16), "k": leaf(2, 50, 2, 16), "v": leaf(2, 50, 2, 16)}

    def in_parts(q, k, v):
        ends = (0, *cuts, 50)
        parts = [
            flash_attention(q, k[:, a:b], v[:, a:b], return_lse=True)
            for a, b in itertools.pairwise(ends)
        ]
        return merge_attention(*zip(*parts, strict=True))

    def at_once(q, k, v):
        return OPS["flash_attention"].reference(q, k, v, return_lse=True)

    assert_within_contract(
        outcome(in_parts, whole), outcome(at_once, whole), outcome(at_once, doubled(whole))
    )


def test_rows_that_no_part_saw():
    o, lse = leaf(1, 3, 1, 4), torch.full((1, 1, 3), -math.inf, requires_grad=True)
    merged, merged_lse = merge_attention([o, o], [lse, lse])
    assert (merged == 0).all()
    assert (merged_lse == -math.inf).all()
    merged.sum().backward()
    assert (o.grad == 0).all()
    assert (lse.grad == 0).all()


def test_merge_refusals():
    o, lse = torch.zeros(1, 3, 1, 4), torch.zeros(1, 1, 3)
    with pytest.raises(ValueError, match="merge_attention: outs and lses must be as many"):
        merge_attention([o], [])
    with pytest.raises(ValueError, match=r"merge_attention: part 1 must be \(1, 3, 1, 4\)"):
        merge_attention([o, o], [lse, lse[..., :2]])


@pytest.mark.parametrize(
    "size",
    [
        {"lengths": (9, 9)},
        {"lengths": (112, 112), "softmax_scale": 0.3},
        {"lengths": (9, 9), "window_size": (3, -1), "softmax_scale": 0.3},
        {"lengths": (9, 9), "window_size": (3, 0), "H_kv": 4},
        {"lengths": (9, 9), "window_size": (-1, 2), "causal": False},
        {"lengths": (4, 4), "S_q": 4},
        {"lengths": (4, 4), "S_q": 4, "causal": False},
        {"lengths": (9, 8)},
        {"lengths": (9, 9), "S_q": 4},
        {"lengths": (0, 0)},
        {"lengths": (200, 200)},
    ],
)
def test_without_a_kernel(size):
    """On a plain CPU sequences of one length take PyTorch's fused op, and give the same."""
    with cpu_runner(None):
        check(OP, example(**size) | {"return_lse": False})
