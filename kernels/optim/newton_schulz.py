"""Newton-Schulz iteration: the nearest orthogonal matrix, roughly, of every matrix of a batch.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. One iteration for a wide X (M, N),
after X has been divided by its norm:

    A = X X^T          B = b A + c A A^T          X = a X + B X

A and B are symmetric: a program computes a tile on or below the diagonal and stores it on both
sides, so the two products cost half. A tall matrix is read as its transpose, by its strides.
bfloat16 with float32 sums, as torch.optim.Muon; the norm is taken in float32.

Cost, bound by the tensor cores: (3 M^2 N + M^3) / 2 multiply-adds an iteration, where full products
take 2 M^2 N + M^3; three launches an iteration for all matrices of a shape.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tuned import tunable


@triton.jit
def _scale_of(squares_ptr, matrix, eps):
    """One over the norm of a matrix."""
    return 1.0 / tl.maximum(tl.sqrt(tl.load(squares_ptr + matrix)), eps)


@triton.jit
def symmetric_kernel(
    x_ptr, out_ptr, squares_ptr,
    stride_xb, stride_xm, stride_xn, M, N, b, c, eps,
    NORMED: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out = c X X^T``, with NORMED of X over its norm, with ADDS plus ``b X``; out is (M, M)."""
    # Tiles of the lower triangle in rows: the row of tile t is the largest r, r (r + 1) / 2 <= t.
    tile = tl.program_id(0)
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)  # the root is rounded
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    col = tile - row * (row + 1) // 2
    matrix = tl.program_id(1).to(tl.int64)
    x_ptr += matrix * stride_xb
    out_ptr += matrix * M * M

    rows = row * BLOCK + tl.arange(0, BLOCK)
    cols = col * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    # Rows past the end give what is not stored, so they may read the row at the start again.
    x_rows = x_ptr + (rows % M).to(tl.int64)[:, None] * stride_xm
    x_cols = x_ptr + (cols % M).to(tl.int64)[None, :] * stride_xm
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, N, BLOCK_K):
        offs = (start + k).to(tl.int64) * stride_xn
        mask = start + k < N
        left = tl.load(x_rows + offs[None, :], mask=mask[None, :], other=0.0)
        right = tl.load(x_cols + offs[:, None], mask=mask[:, None], other=0.0)
        acc = tl.dot(left, right, acc)
    acc *= c
    if NORMED:
        scale = _scale_of(squares_ptr, matrix, eps)
        acc *= scale * scale
    mask = (rows < M)[:, None] & (cols < M)[None, :]
    if ADDS:
        offs = rows.to(tl.int64)[:, None] * stride_xm + cols[None, :] * stride_xn
        acc += b * tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    out = acc.to(tl.bfloat16)
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * M + cols[None, :], out, mask=mask)
    if row != col:
        mirrored = out_ptr + cols.to(tl.int64)[:, None] * M + rows[None, :]
        tl.store(mirrored, tl.trans(out), mask=(cols < M)[:, None] & (rows < M)[None, :])


@triton.jit
def product_kernel(
    b_ptr, x_ptr, out_ptr, squares_ptr,
    stride_xb, stride_xm, stride_xn, M, N, a, eps,
    NORMED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out = a X + B X``, with NORMED of X over its norm; out has the strides of X."""
    blocks = tl.cdiv(N, BLOCK)
    row = tl.program_id(0) // blocks
    col = tl.program_id(0) % blocks
    matrix = tl.program_id(1).to(tl.int64)
    b_ptr += matrix * M * M
    x_ptr += matrix * stride_xb
    out_ptr += matrix * stride_xb

    rows = row * BLOCK + tl.arange(0, BLOCK)
    cols = col * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    b_rows = b_ptr + (rows % M).to(tl.int64)[:, None] * M
    x_cols = x_ptr + (cols % N).to(tl.int64)[None, :] * stride_xn
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, M, BLOCK_K):
        offs = start + k
        mask = offs < M
        left = tl.load(b_rows + offs[None, :], mask=mask[None, :], other=0.0)
        below = x_cols + offs.to(tl.int64)[:, None] * stride_xm
        right = tl.load(below, mask=mask[:, None], other=0.0)
        acc = tl.dot(left, right, acc)
    offs = rows.to(tl.int64)[:, None] * stride_xm + cols.to(tl.int64)[None, :] * stride_xn
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    acc += a * tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if NORMED:
        acc *= _scale_of(squares_ptr, matrix, eps)
    tl.store(out_ptr + offs, acc.to(tl.bfloat16), mask=mask)


@tunable("BLOCK", "BLOCK_K", "num_warps", "num_stages")
def _tile() -> dict[str, int]:
    return {"BLOCK": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}  # unmeasured


def orthogonalize(
    x: Tensor,
    squares: Tensor,
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
) -> None:
    """Replaces each matrix of ``x`` by its image under the iteration.

    Args:
        x: (matrices, rows, columns) bfloat16, contiguous.
        squares: (matrices,) float32, the sum of squares of each.
        coefficients: a, b, c.
        steps: Iterations, at least 1.
        eps: The least norm to divide by.
    """
    a, b, c = coefficients
    matrices, rows, columns = x.shape
    wide = x if rows <= columns else x.mT
    M, N = wide.shape[1:]
    gram, polynomial = torch.empty(2, matrices, M, M, dtype=x.dtype, device=x.device)
    spare = torch.empty(min(steps, 2), *x.shape, dtype=x.dtype, device=x.device)
    options = _tile()
    across = triton.cdiv(M, options["BLOCK"])
    triangle = (across * (across + 1) // 2, matrices)
    whole = (across * triton.cdiv(N, options["BLOCK"]), matrices)
    source = wide
    for step in range(steps):
        first, last = step == 0, step == steps - 1
        target = x if last and steps > 1 else spare[step % 2]
        strides = wide.stride()
        symmetric_kernel[triangle](
            source, gram, squares, *strides, M, N, 0.0, 1.0, eps,
            NORMED=first, ADDS=False, **options,
        )  # fmt: skip
        symmetric_kernel[triangle](
            gram, polynomial, squares, *gram.stride(), M, M, b, c, eps,
            NORMED=False, ADDS=True, **options,
        )  # fmt: skip
        product_kernel[whole](
            polynomial, source, target, squares, *strides, M, N, a, eps, NORMED=first, **options
        )
        source = target
    if steps == 1:
        x.copy_(source)
