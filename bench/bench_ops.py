"""Every op against eager and compiled PyTorch, forward and both passes, at its benchmark sizes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastlm.bench.contenders import contenders
from fastlm.bench.suite import Setting
from fastlm.kernels import OPS


def _settings() -> Iterator[Any]:
    for name, op in OPS.items():
        dtype = torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]
        for size in op.bench_sizes:
            for mode in ("forward", "full"):
                setting = Setting(op, dtype, size, mode)
                yield pytest.param(setting, f"{name} {mode} {setting.label}")


@pytest.mark.parametrize("contender", ["fused", "eager", "compiled"])
@pytest.mark.parametrize(
    ("setting", "case"), [pytest.param(*p.values, id=p.values[1]) for p in _settings()]
)
def bench_op(gpu_bench, setting, case, contender):
    gpu_bench(setting, contender, contenders(setting.op, wanted=["compiled"]).calls[contender])
