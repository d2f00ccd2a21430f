"""Peers' launches through their own host code, as they are on a GPU."""

import os

import pytest
import torch
import triton
import triton.language as tl

from fastlm.bench import against, cases, flex, peers
from fastlm.bench.capture import capture_launches
from fastlm.bench.contenders import has_flex, triton_peers
from fastlm.kernels import OPS


@triton.jit
def _rows_kernel(x_ptr, N, rows_per_program: tl.constexpr):
    for row in range(rows_per_program):
        tl.store(x_ptr + row * N, 0.0)


def test_rows_are_divided_as_on_the_card():
    """Liger-Kernel takes one multiprocessor where the tensors are not on a GPU."""
    with capture_launches(90) as capture:
        _rows_kernel[(1,)](torch.empty(8192), 16, rows_per_program=8192)
    launch = peers._on_a_gpu(capture.launches[0])
    assert launch.grid == (132, 1, 1)
    assert launch.meta["rows_per_program"] == 63  # 8192 rows over 132 multiprocessors
    assert capture.launches[0].meta["rows_per_program"] == 8192
    assert "rows_per_program" in launch.kernel.arg_names
    launch.compile()


def test_liger_s_launches():
    if not triton_peers("layer_norm"):
        pytest.skip("liger-kernel is not installed")
    size = {"M": 8192, "N": 4096}
    cases, missing = peers.peer_cases(OPS["layer_norm"], "sm_90", [size], [torch.bfloat16])
    assert missing == {}
    assert [(c.contender, c.backward, c.launch.grid) for c in cases] == [
        ("liger", False, (8192, 1, 1)),
        ("liger", True, (132, 1, 1)),
    ]


def test_a_peer_that_does_not_take_a_call_is_named(monkeypatch):
    def narrow(input):
        return input

    monkeypatch.setattr(peers, "triton_peers", lambda name: {"narrow": narrow})
    size = {"M": 8, "N": 16}
    cases, missing = peers.peer_cases(OPS["layer_norm"], "sm_90", [size], [torch.bfloat16])
    assert cases == []
    assert "unexpected keyword argument" in missing["layer_norm by narrow"]


def call(direction, contender, target, microseconds):
    return {
        "op": "softmax",
        "case": "bfloat16 M=8",
        "pass": direction,
        "contender": contender,
        "target": target,
        "microseconds": [0.0, microseconds, 0.0],
    }


def test_losses_are_as_plain_as_wins():
    report = {
        "notice": "NOTHING WAS TIMED",
        "targets": ["sm_80", "sm_90", "sm_100"],
        "missing_peers": {"gelu by liger": "TypeError: no"},
        "calls": [
            call("forward", who, target, time)
            for target, ours, theirs in (("sm_80", 10, 12), ("sm_90", 10, 8), ("sm_100", 10, 11))
            for who, time in (("liger", theirs), ("fused", ours))
        ],
    }
    (row,) = against.against_peers(report)
    assert row["ratios"] == {"sm_80": 1.2, "sm_90": 0.8, "sm_100": 1.1}
    assert [against.verdict(ratio) for ratio in row["ratios"].values()] == ["win", "loss", ""]
    text = against.peers_table(report)
    assert text.splitlines()[0] == text.splitlines()[-1] == "NOTHING WAS TIMED"
    for words in (
        "1.20x win",
        "0.80x loss",
        "3 figures: 1 are wins, 1 are losses",
        "in 1 of all ours is the slower",
        "gelu by liger: TypeError",
    ):
        assert words in text


def test_passes_are_judged_together():
    """A peer that computes its gradient in the forward has a slow forward and no backward."""
    report = {
        "targets": ["sm_90"],
        "calls": [
            call("forward", "fused", "sm_90", 250),
            call("backward", "fused", "sm_90", 550),
            call("forward", "liger", "sm_90", 760),
        ],
    }
    rows = against.against_peers(report)
    assert [(row["pass"], row["ratios"]) for row in rows] == [
        ("forward", {"sm_90": 3.04}),
        (against.BOTH, {"sm_90": 0.95}),
    ]
    said = against.in_words(rows)
    assert "1 figures: 0 are wins, 0 are losses" in said
    assert "in 1 of all ours is the slower" in said


def test_a_loss_starts_its_backward_with_one():
    """Liger-Kernel's losses launch nothing in a backward from a gradient of 1."""
    seen = []

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(gradient.item())
            return torch.zeros(8, 16)

    def loss(input, **_):
        return Loss.apply(input)

    size = {"M": 8, "N": 16}
    cases.cases_of(
        OPS["layer_norm"], 90, sizes=[size], dtypes=[torch.float32], contender="peer", call=loss
    )
    assert seen == [1.0]


def test_ops_without_peers_have_no_cases():
    assert triton_peers("nonsense") == {}
    assert not has_flex("nonsense")


# --- FlexAttention --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flex_cases():
    """FlexAttention's launches on sm_90, D 64, causal, two heads of 256 tokens."""
    op = OPS["scaled_dot_product_attention"]
    size = {"B": 1, "S_q": 256, "S_k": 256, "H": 2, "H_kv": 2, "D": 64, "is_causal": True}
    found, missing = peers.peer_cases(op, "sm_90", [size], [torch.bfloat16])
    if missing:  # a PyTorch whose Inductor goes by other names says so, in the report as here
        pytest.skip(str(missing))
    return found


def test_flex_launches_what_inductor_would(flex_cases):
    forward, delta, backward = flex_cases
    assert [c.backward for c in flex_cases] == [False, True, True]
    assert {c.contender for c in flex_cases} == {"flex"}
    assert forward.launch.grid == (2, 1, 2)  # 256 rows in tiles of 128; batch; heads
    assert forward.launch.options["num_warps"] == 4
    assert "BLOCK_M : tl.constexpr = 128" in forward.launch.kernel.src
    sizes = delta.launch.arguments  # a sum of 64 products for each row
    assert sizes["r0_numel"] == 64
    assert sizes["xnumel"] * sizes.get("ynumel", 1) == 512
    assert backward.launch.grid == (4, 1, 2)  # tiles of keys, then of queries


def test_flex_s_tables_give_its_loops(flex_cases):
    """Causal: one block on the diagonal, and as many whole blocks as lie before it."""
    tables = flex_cases[0].launch.arguments
    assert tables["arg_KV_NUM_BLKS"].flatten().tolist() == [1, 1]
    assert tables["arg_FULL_KV_NUM_BLKS"].flatten().tolist() == [0, 1]


def test_what_fails_in_the_fork_is_said():
    def fails():
        raise LookupError("no such template\nand more")

    with pytest.raises(RuntimeError, match=r"^Inductor: LookupError: no such template$"):
        flex._in_a_fork(fails)
    with pytest.raises(RuntimeError, match="ended without a word"):
        flex._in_a_fork(lambda: os._exit(3))
    assert flex._in_a_fork(lambda: [1, "a"]) == [1, "a"]


def test_what_flex_does_not_take_is_named():
    op = OPS["scaled_dot_product_attention"]
    size = {"B": 1, "S_q": 64, "S_k": 64, "H": 1, "H_kv": 1, "D": 64, "dropout_p": 0.1}
    found, missing = peers.peer_cases(op, "sm_90", [size], [torch.bfloat16])
    assert found == []
    assert "dropout_p" in missing["scaled_dot_product_attention by flex"]
