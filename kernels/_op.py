"""What every fused op declares once: the tests, the benchmarks and the compile check read it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Op:
    """One fused operation beside the eager PyTorch function that defines it.

    Attributes:
        fused: The public function.
        reference: The same signature and the same result in plain, differentiable PyTorch.
        example: Builds the keyword arguments of both: ``example(dtype, device, **size)``.
        sizes: Small and awkward sizes, for the tests and the compile check.
        bench_sizes: Sizes that fill a GPU, for the benchmarks.
        work: Least bytes moved and floating-point operations of a forward call on those inputs.
        dtypes: Dtypes that the kernels cover.
    """

    fused: Callable[..., Any]
    reference: Callable[..., Any]
    example: Callable[..., Inputs]
    sizes: Sequence[Mapping[str, Any]]
    bench_sizes: Sequence[Mapping[str, Any]]
    work: Callable[..., tuple[int, int]]
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16)

    @property
    def name(self) -> str:
        """The public function's name."""
        return self.fused.__name__
