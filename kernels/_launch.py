"""Facts of the device, and ways to hand tensors to kernels, that two or more ops share."""

import functools

import torch
from torch import Tensor
from triton.runtime import driver

from . import _dispatch


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device that runs, or of the one that is compiled for."""
    if device.type == "cuda":
        return _multiprocessors(device.index)
    if _dispatch._cpu_runner == "interpreter":
        return 1  # one program after another: the fewer the better
    return driver.active.utils.get_device_properties(0)["multiprocessor_count"]


def rows_of(x: Tensor, N: int) -> Tensor:
    """``x`` as (M, N) with a last stride of 1 and any row stride: a view where one exists."""
    rows = x.reshape(-1, N)
    return rows if rows.stride(1) == 1 or N == 1 else rows.contiguous()
