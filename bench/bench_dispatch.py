"""What a drop-in costs on the CPU over PyTorch's own function.

Run: ``pytest bench/bench_dispatch.py --benchmark-enable``
"""

import pytest
import torch

from fastlm.kernels import OPS

DROP_INS = {name: op.fused for name, op in OPS.items() if hasattr(op.fused, "dispatch")}


@pytest.mark.parametrize("which", ["eager", "fused"])
@pytest.mark.parametrize("name", DROP_INS)
def bench_cpu_call(benchmark, name, which):
    op, fused = OPS[name], DROP_INS[name]
    benchmark.group = f"{name}, smallest size, on the CPU"
    inputs = op.example(torch.float32, torch.device("cpu"), **op.sizes[0])
    inputs = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    fn = fused if which == "fused" else fused.dispatch.eager
    benchmark(fn, *inputs.values())
