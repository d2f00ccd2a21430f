"""Peers' launches through their own host code, as they are on a GPU."""

import pytest
import torch
import triton
import triton.language as tl

from fastlm.bench import against, peers
from fastlm.bench.capture import capture_launches
from fastlm.bench.contenders import triton_peers
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
        "1 are wins, 1 are losses",
        "gelu by liger: TypeError",
    ):
        assert words in text


def test_ops_without_peers_have_no_cases():
    assert triton_peers("nonsense") == {}
