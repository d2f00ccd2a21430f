"""Facts of the device, and ways to hand tensors to kernels, that two or more ops share."""

import functools

import torch
from torch import Tensor
from triton.runtime import driver


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; without a GPU, what the active driver says."""
    if device.type == "cuda":
        return _multiprocessors(device.index)
    utils = getattr(driver.active, "utils", None)
    return utils.get_device_properties(0)["multiprocessor_count"] if utils else 4


def rows_of(x: Tensor, N: int) -> Tensor:
    """``x`` as (M, N) with a last stride of 1 and any row stride: a view where one exists."""
    rows = x.reshape(-1, N)
    return rows if rows.stride(1) == 1 or N == 1 else rows.contiguous()
