"""Peers' launches through their own host code, as they are on a GPU."""

import pytest
import torch
import triton
import triton.language as tl

from fastlm.bench import peers
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


def test_ops_without_peers_have_no_cases():
    assert triton_peers("nonsense") == {}
