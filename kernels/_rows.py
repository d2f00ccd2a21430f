"""What kernels over rows share: tile sizes, parameters' gradients summed over programs, checks."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tuned import tunable

WIDE = 16384  # columns past which a forward row is read in blocks; unmeasured
# The same of the backward, which keeps five rows in registers; unmeasured. At 16384 columns in
# bfloat16 no whole row fits. Instructions in rms_norm that spill, at 16 and 32 warps: 88 and 66 on
# sm_90, 84 and 48 on sm_80, 95 and 59 on sm_100, 93 and 56 on sm_120; in layer_norm 122 and 91, 128
# and 77, 177 and 108, 231 and 116, and still 30 and 28 on sm_90 where it reads x and dy again, as
# rms_norm does, which then spills nothing. The model, for which spills cost what L1 does, has the
# whole rows faster all the same for 8192 rows on sm_90, 272 and 281 us against 448 and 461 us of
# what runs instead, where it takes rms_norm's second reads for reads of memory. Loops that spill
# are refused here.
WIDE_BACKWARD = 8192


@tunable("BLOCK_M", "num_warps")
def row_tile(N: int) -> dict[str, int]:
    """Whole rows of N <= WIDE columns, 32 elements a thread: unmeasured.

    A warp takes 1024: a row to that width, or several narrow ones, is summed without a barrier. The
    layer norm of 8192 x 1024 in bfloat16 is modelled at 6.4 us on sm_100 so, at 9.8 us in 4 warps.
    """
    block_n = triton.next_power_of_2(N)
    rows, warps = max(1, 1024 // block_n), max(1, min(block_n // 1024, 16))
    return {"BLOCK_M": rows, "BLOCK_N": block_n, "num_warps": warps}


def backward_tile(N: int) -> tuple[dict[str, int], int]:
    """The rows that a program of the backward takes at once, and programs a multiprocessor.

    Few programs keep the parts of the parameters' gradients small, large tiles keep bytes in
    flight: for the layer norm of 8192 x 768 in bfloat16 the modelled time on sm_90 is 19 us against
    68 us for a row at a time (11 us is the least that memory allows); for 8192 x 4096 it is 72 us
    against 98 us (60 us).
    """
    tile = _backward_tile(N)
    return tile, tile.pop("per_multiprocessor")


@tunable("BLOCK_M", "num_warps", "per_multiprocessor")
def _backward_tile(N: int) -> dict[str, int]:
    block_n = triton.next_power_of_2(N)
    elements, warps, per_multiprocessor = (4096, 8, 2) if block_n <= 1024 else (8192, 16, 1)
    return {
        "BLOCK_M": min(max(1, elements // block_n), 64),
        "BLOCK_N": block_n,
        "num_warps": warps,
        "per_multiprocessor": per_multiprocessor,
    }


@triton.jit
def _sum_parts_kernel(
    dweight_parts_ptr, dbias_parts_ptr, dweight_ptr, dbias_ptr,
    P, N,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums the programs' parts in a fixed order, so that two runs agree to the bit."""
    parts = tl.arange(0, BLOCK_P)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = cols < N
    dweight = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for start in range(0, P, BLOCK_P):
        rows = start + parts
        mask = (rows < P)[:, None] & mask_n[None, :]
        offsets = rows.to(tl.int64)[:, None] * N + cols[None, :]
        if HAS_WEIGHT:
            dweight += tl.load(dweight_parts_ptr + offsets, mask=mask, other=0.0)
        if HAS_BIAS:
            dbias += tl.load(dbias_parts_ptr + offsets, mask=mask, other=0.0)
    if HAS_WEIGHT:
        tl.store(dweight_ptr + cols, tl.sum(dweight, 0), mask=mask_n)
    if HAS_BIAS:
        tl.store(dbias_ptr + cols, tl.sum(dbias, 0), mask=mask_n)


def sum_parts(
    dweight_parts: Tensor | None,
    dbias_parts: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """Writes the sums of (P, N) float32 parts into ``dweight`` and ``dbias``, where given."""
    parts = dbias_parts if dweight_parts is None else dweight_parts
    assert parts is not None
    P, N = parts.shape
    # Many parts at once and few columns, in small programs: 132 parts of 4096 columns take a
    # modelled 3.8 us on sm_90 so, 4.1 us in tiles of (256, 32) with 8 warps, and 12 us in tiles of
    # (32, 128), with one read after another in a quarter of the multiprocessors. 264 parts of 768
    # take 3.6 us at once, and 6.2 us in two turns of 256.
    block_p = min(max(triton.next_power_of_2(P), 4), 512)
    warps = 4 if block_p <= 256 else 8
    block_n = 1024 * warps // block_p
    _sum_parts_kernel[(triton.cdiv(N, block_n),)](
        dweight_parts, dbias_parts, dweight, dbias,
        P, N,
        HAS_WEIGHT=dweight is not None, HAS_BIAS=dbias is not None,
        BLOCK_P=block_p, BLOCK_N=block_n, num_warps=warps,
    )  # fmt: skip


def uncovered_norm(
    dtypes: Sequence[torch.dtype],
    normalized_shape: Sequence[int],
    input: Tensor,
    **parameters: Tensor | None,
) -> str | None:
    """Why a norm's kernel leaves this call to PyTorch, or None."""
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        return f"normalized_shape {shape} is not the end of input's shape {tuple(input.shape)}"
    for name, t in (("input", input), *parameters.items()):
        if t is None:
            continue
        if t.dtype not in dtypes:
            return f"{name} is {t.dtype}"
        if t.device != input.device:
            return f"{name} is on {t.device} and input on {input.device}"
        if t is not input and tuple(t.shape) != shape:
            return f"{name} has shape {tuple(t.shape)}, not {shape}"
    return None
