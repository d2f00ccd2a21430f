"""What a step costs on the host, in Python and launches, at GPT-2's 148 parameters.

Run: ``pytest bench/bench_optimizer_host.py --benchmark-enable``

Parameters have one element each, so PyTorch's fused step spends nothing on arithmetic; the fused
kernels are compiled and go through Triton's own launcher up to the driver, which does nothing. No
GPU is involved: these are host times only.
"""

import pytest
import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastlm.bench.capture import capture_launches
from fastlm.kernels import AdamW

COUNT = 148


@pytest.fixture
def launches_only():
    """Kernels are compiled, looked up and launched by Triton, and never run."""
    compiles = JITFunction._do_compile
    with capture_launches("sm90"):
        JITFunction._do_compile = compiles  # instead of recording
        driver.active.launcher_cls = lambda source, metadata: lambda *arguments: None
        driver.active.utils.load_binary = lambda *binary: (None, None, 0, 0, 1024)
        yield


def model(kind):
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(COUNT)]
    for p in params:
        p.grad = torch.zeros(1)
    groups = [{"params": params[:50], "weight_decay": 0.1}, {"params": params[50:]}]
    return params, kind(groups, fused=True)


@pytest.mark.parametrize("gradients", ["kept", "reallocated"])
@pytest.mark.parametrize("which", ["fused", "torch_fused"])
def bench_step(benchmark, launches_only, which, gradients):
    benchmark.group = f"step of {COUNT} parameters in two groups, gradients {gradients}"
    params, optimizer = model(AdamW if which == "fused" else torch.optim.AdamW)
    optimizer.step()
    spare = [[torch.zeros(1) for _ in params] for _ in range(2)]

    def other_gradients():
        spare.reverse()
        for p, g in zip(params, spare[0], strict=True):
            p.grad = g

    setup = other_gradients if gradients == "reallocated" else None
    benchmark.pedantic(optimizer.step, setup=setup, rounds=300, warmup_rounds=10)
