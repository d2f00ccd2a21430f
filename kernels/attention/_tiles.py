"""Tile shapes by kernel, GPU class and head dimension; loading and multiplying a tile.

The rows were chosen by compiled code (no spills in the main loops, tensor cores, 16-byte copies,
shared and tensor memory within the part's limits) and are unmeasured: no row has been timed.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import _dispatch
from .._tuned import tunable


class Tile(NamedTuple):
    """A tile of BLOCK_M queries by BLOCK_N keys, and how it is launched."""

    m: int
    n: int
    warps: int
    stages: int
    specialised: bool | None = None  # see specialised.py; None where the kernel has no such form

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# (kernel, GPU class) -> {BLOCK_D: tile} for 16-bit inputs; unmeasured
_HALF: dict[tuple[str, str], dict[int, Tile]] = {
    ("forward", "a100"): {
        64: Tile(128, 64, 4, 3), 128: Tile(128, 128, 8, 2), 192: Tile(128, 64, 8, 2),
        256: Tile(64, 64, 8, 2), 512: Tile(32, 32, 8, 2),
    },
    ("forward", "hopper"): {
        64: Tile(128, 64, 4, 3), 128: Tile(128, 128, 8, 2), 192: Tile(128, 128, 8, 2),
        256: Tile(128, 64, 8, 2), 512: Tile(64, 32, 8, 2),
    },
    ("forward", "blackwell"): {
        64: Tile(128, 64, 4, 2), 128: Tile(128, 128, 8, 2), 192: Tile(128, 128, 8, 2),
        256: Tile(128, 64, 8, 2), 512: Tile(64, 32, 8, 2),
    },
    ("forward", "small"): {
        64: Tile(128, 64, 4, 2), 128: Tile(128, 64, 8, 2), 192: Tile(128, 32, 8, 2),
        256: Tile(64, 32, 8, 2), 512: Tile(32, 32, 8, 2),
    },
    ("dkdv", "a100"): {
        64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 64, 8, 2),
    },
    ("dkdv", "hopper"): {
        64: Tile(64, 64, 4, 2), 128: Tile(64, 128, 8, 3), 256: Tile(64, 32, 8, 2),
    },
    ("dkdv", "blackwell"): {
        64: Tile(64, 128, 8, 3), 128: Tile(64, 128, 8, 3), 256: Tile(32, 64, 8, 2),
    },
    ("dkdv", "small"): {
        64: Tile(32, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 2),
    },
    ("dq", "a100"): {
        64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 2),
    },
    ("dq", "hopper"): {
        64: Tile(64, 128, 4, 2), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2),
    },
    ("dq", "blackwell"): {
        64: Tile(128, 64, 4, 2), 128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2),
    },
    ("dq", "small"): {
        64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(32, 32, 4, 2),
    },
}  # fmt: skip

# The rows above are what Triton 3.7 compiles with no spill in a loop; other versions want smaller
_ELSEWHERE: dict[tuple[str, str, int], Tile] = {
    ("forward", "a100", 128): Tile(128, 64, 8, 3),
    ("dkdv", "hopper", 128): Tile(64, 128, 8, 2),
}
if triton.__version__.startswith("3.7."):
    _ELSEWHERE = {}
elif triton.__version__.startswith("3.9."):
    _ELSEWHERE["dkdv", "hopper", 128] = Tile(32, 128, 8, 2)

# Where D is not BLOCK_D the masks of the loads take registers: smaller tiles; unmeasured
_HALF_PADDED: dict[tuple[str, str, int], Tile] = {
    ("forward", "a100", 64): Tile(128, 128, 8, 2),
    ("forward", "a100", 128): Tile(128, 64, 8, 3),
    ("forward", "small", 128): Tile(128, 32, 8, 2),
    ("dkdv", "hopper", 64): Tile(64, 128, 8, 2),
    ("dkdv", "hopper", 128): Tile(64, 64, 8, 2),
    ("dq", "a100", 128): Tile(128, 32, 8, 2),
    ("dq", "hopper", 64): Tile(128, 64, 8, 2),
    ("dq", "hopper", 128): Tile(128, 64, 8, 2),
    ("dq", "blackwell", 64): Tile(128, 64, 8, 2),
}

# The same where registers hold more: forward of anything but plain attention, dense, with k and v
# laid out alike in rows of 16 bytes a copy; dkdv of a ragged batch, which keeps what are arguments
# otherwise (64 x 128 spills in its loops)
_HALF_BUSY: dict[tuple[str, str, int], Tile] = {
    ("forward", "a100", 64): Tile(128, 128, 8, 2),
    ("forward", "a100", 128): Tile(128, 64, 8, 3),
    ("dkdv", "hopper", 128): Tile(32, 128, 8, 3),
}

# Beside a bias or dropout a second tile of scores lives in registers; unmeasured. With 8 warps
# ptxas (CUDA 12.8) gives a 64 x 64 dkdv with a bias 32 registers on sm_80, and spills the rest.
_CROWDED: dict[tuple[str, str, int], Tile] = {
    ("forward", "a100", 64): Tile(128, 32, 8, 2),
    ("forward", "small", 64): Tile(128, 32, 8, 2),
    ("forward", "hopper", 64): Tile(128, 64, 8, 2),
    ("forward", "blackwell", 64): Tile(128, 32, 8, 2),
    ("forward", "a100", 128): Tile(64, 32, 8, 2),
    ("forward", "small", 128): Tile(64, 32, 8, 2),
    ("forward", "hopper", 128): Tile(128, 32, 8, 2),
    ("forward", "blackwell", 128): Tile(128, 32, 8, 1),
    ("forward", "a100", 192): Tile(64, 32, 8, 2),
    ("forward", "small", 192): Tile(64, 32, 8, 2),
    ("forward", "hopper", 192): Tile(128, 32, 8, 2),
    ("forward", "blackwell", 192): Tile(128, 32, 8, 1),
    ("dkdv", "a100", 64): Tile(64, 32, 4, 2),
    ("dkdv", "small", 64): Tile(64, 32, 4, 2),
    ("dkdv", "a100", 128): Tile(64, 64, 8, 2),
    ("dkdv", "hopper", 64): Tile(64, 128, 8, 2),
    ("dkdv", "hopper", 128): Tile(32, 128, 8, 2),
    ("dkdv", "blackwell", 128): Tile(32, 128, 8, 2),
    ("dq", "a100", 64): Tile(128, 32, 8, 2),
    ("dq", "small", 64): Tile(128, 32, 8, 2),
    ("dq", "a100", 128): Tile(64, 64, 8, 2),
    ("dq", "small", 128): Tile(64, 64, 8, 2),
    ("dq", "hopper", 64): Tile(128, 64, 8, 2),
    ("dq", "hopper", 128): Tile(128, 64, 8, 2),
}

# float32 goes through three tf32 products, which hold both halves of each operand; unmeasured
_FLOAT: dict[str, dict[int, Tile]] = {
    "forward": {64: Tile(64, 32, 4, 2), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 8, 1)},
    "dkdv": {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
    "dq": {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 32, 8, 1)},
}
_FLOAT_CROWDED: dict[tuple[str, int], Tile] = {("dq", 256): Tile(16, 16, 8, 1)}

# Small and unequal, so that a short test has whole tiles, diagonal tiles and a tail of each kind.
_INTERPRETED = {
    "forward": Tile(32, 16, 2, 1),  # 2 warps: partial_sums is then 8, as on most GPUs
    "dkdv": Tile(16, 32, 4, 1),
    "dq": Tile(32, 16, 4, 1),
}
_INTERPRETED_CLASS = "a100"  # pointers, as on most GPUs; tests change it


def _class_of(arch: int) -> str:
    """GPUs with the same tensor cores and about the same shared memory."""
    if arch == 90:
        return "hopper"
    if 100 <= arch < 120:
        return "blackwell"
    if arch in (80, 87):
        return "a100"
    return "small"  # 86, 89, 120, 121: 99 KiB a block, mma.sync tensor cores


@functools.cache
def _class_of_device(index: int | None) -> str:
    return _class_of(driver.active.get_current_target().arch)


def gpu_class(x: Tensor) -> str:
    """The class of the GPU where ``x`` lives, or that is compiled for."""
    if x.is_cuda:
        return _class_of_device(x.device.index)
    if _dispatch._cpu_runner == "interpreter":
        return _INTERPRETED_CLASS
    return _class_of(driver.active.get_current_target().arch)


@tunable("m", "n", "warps", "stages", "specialised")
def tile_of(
    kernel: str, x: Tensor, block_d: int, *, busy: bool = False, crowded: bool = False
) -> Tile:
    """The tile that ships for this kernel on the GPU where ``x`` (..., D) lives.

    ``busy``: as of ``_HALF_BUSY``. ``crowded``: a bias or dropout keeps a second tile beside the
    scores, and wants 8 warps for it.
    """
    if not x.is_cuda and _dispatch._cpu_runner == "interpreter":
        return _INTERPRETED[kernel]
    row = max(block_d, 64)
    if x.dtype == torch.float32:
        row = triton.next_power_of_2(row)
        tile = _FLOAT[kernel][row]
        return _FLOAT_CROWDED.get((kernel, row), tile) if crowded else tile
    gpu = gpu_class(x)
    tile = _HALF[kernel, gpu][row]
    tile = _ELSEWHERE.get((kernel, gpu, row), tile)
    if busy:
        tile = _HALF_BUSY.get((kernel, gpu, row), tile)
    if x.shape[-1] != block_d:
        tile = _HALF_PADDED.get((kernel, gpu, row), tile)
    if crowded:
        return _CROWDED.get((kernel, gpu, row), tile._replace(warps=8))
    if kernel == "forward" and row <= 128 and gpu in ("hopper", "blackwell"):
        return tile._replace(specialised=False)  # off until a card has measured it
    return tile


def block_d_of(D: int) -> int:
    """The tile's width for a head dimension: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(D))


def chunks_of(D: int) -> tuple[int, int | None]:
    """Widths of one tile or two that hold a head's products with the keys.

    A head of 192 is 128 and 64: as one tile it would take 256.
    """
    return (128, block_d_of(D - 128)) if 128 < D <= 192 else (block_d_of(D), None)


def described(x: Tensor, rows: int, block_d: int) -> TensorDescriptor | None:
    """``x`` (B, S, H, D) as a TMA descriptor of tiles of rows, where the GPU and the strides allow.

    A descriptor spares the loop its addresses and masks: reads past S or D give 0.
    """
    if x.dtype == torch.float32 or x.numel() == 0:
        return None
    if gpu_class(x) not in ("hopper", "blackwell"):
        return None
    # of a dimension of size 1 the stride is free
    strides = [s if n > 1 else block_d for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    if x.data_ptr() % 16 or any(s == 0 or s * x.itemsize % 16 for s in strides):
        return None
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, rows, 1, block_d])


def starts_full(x: Tensor) -> bool:
    """Whether a product may start from a tile of numbers, which spares their sum after it.

    mma.sync and WGMMA accumulate in registers. Tensor memory would be written first: with it dq of
    64 dimensions has 10 % more instructions on sm_100 (Triton 3.7.1).
    """
    return gpu_class(x) != "blackwell"


def partial_sums(tile: Tile, x: Tensor, width: int) -> int:
    """Into how many columns the forward sums weights, so that no thread asks another in its loop.

    The results of mma.sync and WGMMA lie so that four threads share a row, two columns of eight
    each: sums by column mod 8. Of tensor memory a thread of 4 warps reads a row, of 8 warps half a
    row. 1, where rows cross warps, or where two more numbers a thread spill (sm_80, 128
    dimensions).
    """
    gpu = gpu_class(x)
    if gpu == "blackwell":
        return 2 if tile.warps == 8 else 1
    if tile.m < 16 * tile.warps or (gpu == "a100" and width >= 128):
        return 1
    return 8


@triton.jit
def load_rows(descriptor, b, row, h, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, col=0):
    """A (BLOCK, BLOCK_D) tile of one head through its descriptor; h None: it has no other head."""
    if h is None:
        tile = descriptor.load([row, col])
    else:
        tile = descriptor.load([b.to(tl.int32), row, h.to(tl.int32), col]).reshape(BLOCK, BLOCK_D)
    return tile


@triton.jit
def dot(a, b, acc=None):
    """``a @ b + acc``: float32 operands as three tf32 products, which keep 22 bits or more."""
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def load_tile(ptrs, rows_seen, dims_seen, CHECK_ROWS: tl.constexpr, CHECK_DIMS: tl.constexpr):
    """A tile with zeros where a row or a dimension lies outside; the masks have the tile's rank."""
    if CHECK_ROWS and CHECK_DIMS:
        x = tl.load(ptrs, mask=rows_seen & dims_seen, other=0.0)
    elif CHECK_ROWS:
        x = tl.load(ptrs, mask=rows_seen, other=0.0)
    elif CHECK_DIMS:
        x = tl.load(ptrs, mask=dims_seen, other=0.0)
    else:
        x = tl.load(ptrs)
    return x
