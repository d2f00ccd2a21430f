r"""A residual connection and the norm after it in one pass, for pre-norm blocks.

Forward, for each row, with xhat and the norms as in layer_norm and rms_norm:

    new_residual = dropout(x) + residual, rounded to its dtype        y = norm(new_residual)

Backward, where dnorm(dy) is the norm's dx and dnew_residual the gradient of the stream further on:

    d = dnorm(dy) + dnew_residual        dresidual = d        dx = dropout'(d)

Without dropout the two gradients of one dtype are one tensor. The forward reads x and residual and
writes y and new_residual; the backward reads dy, new_residual and dnew_residual and writes d: 4 M N
elements each, where an add and a norm move 5 and 6. Saved for the backward: new_residual, which the
model holds anyway, 8 bytes a row (4 without a mean), and a seed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._dispatch import dispatched
from ._launch import multiprocessors, rows_of
from ._op import Inputs, Op
from ._philox import as_seed, draw, keep_mask, scale_of, threshold_of
from ._register import eager_gradients, torch_op
from ._rows import WIDE, WIDE_BACKWARD, backward_tile, row_tile, sum_parts, uncovered_norm
from .rms_norm import EPS
from .rms_norm import reference as rms_norm_reference

Seed = int | Tensor | None


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Sequence[int],
    eps: float,
    weight_offset: float,
    centred: bool,
) -> Tensor:
    """The norm in eager PyTorch, in the widest dtype among its tensors."""
    dtypes = {t.dtype for t in (x, weight, bias) if t is not None}
    if len(dtypes) > 1:  # else nothing to convert, which on a CPU would cost as much as the norm
        wide = functools.reduce(torch.promote_types, dtypes)
        x = x.to(wide)
        weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    if centred:
        return F.layer_norm(x, shape, weight, bias, eps)
    return rms_norm_reference(x, shape, weight, eps, weight_offset=weight_offset)


def _dropped(x: Tensor, N: int, dropout_p: float, seed: Tensor) -> Tensor:
    """Dropout over rows of N by the kernels' mask, in eager PyTorch."""
    keep = keep_mask(seed, dropout_p, x.numel() // max(N, 1), N).view(x.shape)
    return torch.where(keep, x * scale_of(dropout_p), 0.0)


def _reference(
    name: str,
    x: Tensor,
    residual: Tensor,
    shape: Sequence[int],
    norm: Callable[[Tensor], Tensor],
    dropout_p: float,
    seed: Seed,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    if residual.shape != x.shape:
        raise ValueError(
            f"{name}: residual must have the shape of x, {tuple(x.shape)}; "
            f"got {tuple(residual.shape)}"
        )
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{name}: dropout_p must be in [0, 1]; got {dropout_p}")
    if dropout_p and seed is None:
        x = F.dropout(x, dropout_p)
    elif dropout_p:
        x = _dropped(x, math.prod(shape), dropout_p, as_seed(seed, x.device))
    new_residual = x + residual
    if new_residual.dtype != (dtype or residual.dtype):
        new_residual = new_residual.to(dtype or residual.dtype)
    y = norm(new_residual)
    return (y if y.dtype == x.dtype else y.to(x.dtype)), new_residual


def layer_reference(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: Seed = None,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Dropout, add and layer norm in eager PyTorch."""

    def norm(t: Tensor) -> Tensor:
        return _norm(t, weight, bias, normalized_shape, eps, 0.0, True)

    return _reference(
        "add_layer_norm", x, residual, normalized_shape, norm, dropout_p, seed, residual_dtype
    )


def rms_reference(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    seed: Seed = None,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Dropout, add and root-mean-square norm in eager PyTorch."""

    def norm(t: Tensor) -> Tensor:
        chosen = EPS if eps is None else eps
        return _norm(t, weight, None, normalized_shape, chosen, weight_offset, False)

    return _reference(
        "add_rms_norm", x, residual, normalized_shape, norm, dropout_p, seed, residual_dtype
    )


# --- kernels ------------------------------------------------------------------------------------
# A pointer that is None says that the call has no such tensor, or wants no such gradient.


@triton.jit
def _dropout(
    x, seed_ptr, rows, start, N, threshold, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Dropout of a tile in registers; its columns begin at start, a multiple of 4."""
    if seed_ptr is not None:
        quads = start // 4 + tl.arange(0, BLOCK_N // 4)
        counters = rows[:, None] * tl.cdiv(N, 4) + quads[None, :]
        drawn = tl.reshape(draw(tl.load(seed_ptr), counters), [BLOCK_M, BLOCK_N])
        x = tl.where(drawn >= threshold, x * scale, 0.0)
    return x


@triton.jit
def _affine(xhat, weight_ptr, bias_ptr, cols, mask, weight_offset):
    """Every row of xhat times the weight, plus the bias, where there are such."""
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        xhat *= (weight_offset + weight)[None, :]
    if bias_ptr is not None:
        xhat += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)[None, :]
    return xhat


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, new_ptr, mean_ptr, rstd_ptr,
    stride_xm, stride_rm, M, N, eps, weight_offset, threshold, scale,
    CENTRED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program adds and normalises BLOCK_M whole rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask_m = rows < M
    mask_n = cols < N
    mask = mask_m[:, None] & mask_n[None, :]
    offsets = rows[:, None] * N + cols[None, :]

    x_ptrs = x_ptr + rows[:, None] * stride_xm + cols[None, :]
    residual_ptrs = residual_ptr + rows[:, None] * stride_rm + cols[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    x = _dropout(x, seed_ptr, rows, 0, N, threshold, scale, BLOCK_M, BLOCK_N)
    new = (x + residual).to(new_ptr.dtype.element_ty)
    tl.store(new_ptr + offsets, new, mask=mask)

    new = new.to(tl.float32)  # what the backward will read
    if CENTRED:
        mean = tl.sum(new, 1) / N
        new = tl.where(mask, new - mean[:, None], 0.0)
        tl.store(mean_ptr + rows, mean, mask=mask_m)
    rstd = tl.rsqrt(tl.sum(new * new, 1) / N + eps)
    y = _affine(new * rstd[:, None], weight_ptr, bias_ptr, cols, mask_n, weight_offset)
    tl.store(y_ptr + offsets, y, mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=mask_m)


@triton.jit
def _forward_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, new_ptr, mean_ptr, rstd_ptr,
    stride_xm, stride_rm, N, eps, weight_offset, threshold, scale,
    CENTRED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program adds and normalises one row, a block of columns at a time."""
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.arange(0, 1)

    # Each block has its own mean and squared deviations; they merge exactly (Chan et al. 1979).
    mean = 0.0
    deviations = 0.0
    for start in range(0, N, BLOCK_N):
        cols = (start + tl.arange(0, BLOCK_N))[None, :]
        mask = cols < N
        x_ptrs = x_ptr + row * stride_xm + cols
        residual_ptrs = residual_ptr + row * stride_rm + cols
        x = tl.load(x_ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
        residual = tl.load(residual_ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
        x = _dropout(
            x.to(tl.float32), seed_ptr, rows, start, N, threshold, scale, 1, BLOCK_N
        )  # fmt: skip
        new = (x + residual.to(tl.float32)).to(new_ptr.dtype.element_ty)
        tl.store(new_ptr + row * N + cols, new, mask=mask, eviction_policy="evict_last")
        new = new.to(tl.float32)
        if CENTRED:
            size = tl.minimum(N - start, BLOCK_N)
            block_mean = tl.sum(new) / size
            new = tl.where(mask, new - block_mean, 0.0)
            delta = block_mean - mean
            share = size / (start + size)
            mean += delta * share
            deviations += delta * delta * share * start
        deviations += tl.sum(new * new)
    rstd = tl.rsqrt(deviations / N + eps)

    tl.debug_barrier()  # other threads' part of new_residual is read below
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < N
        new = tl.load(new_ptr + row * N + cols[None, :], mask=mask[None, :], other=0.0)
        xhat = (new.to(tl.float32) - mean) * rstd
        y = _affine(xhat, weight_ptr, bias_ptr, cols, mask, weight_offset)
        tl.store(y_ptr + row * N + cols[None, :], y, mask=mask[None, :])

    if CENTRED:
        tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _row_means_kernel(
    dy_ptr, new_ptr, weight_ptr, mean_ptr, rstd_ptr, mean_g_ptr, mean_gx_ptr,
    stride_dym, N, weight_offset,
    CENTRED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of one wide row: the means that its gradient needs."""
    row = tl.program_id(0).to(tl.int64)
    mean = tl.load(mean_ptr + row) if CENTRED else 0.0
    sum_g = tl.zeros([1, BLOCK_N], tl.float32)
    sum_gx = tl.zeros([1, BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < N
        new_ptrs = new_ptr + row * N + cols[None, :]
        dy_ptrs = dy_ptr + row * stride_dym + cols[None, :]
        new = tl.load(new_ptrs, mask=mask[None, :], other=0.0).to(tl.float32)
        dy = tl.load(dy_ptrs, mask=mask[None, :], other=0.0).to(tl.float32)
        g = _affine(dy, weight_ptr, None, cols, mask, weight_offset)
        sum_g += g
        sum_gx += g * (new - mean)
    if CENTRED:
        tl.store(mean_g_ptr + row, tl.sum(sum_g) / N)
    tl.store(mean_gx_ptr + row, tl.sum(sum_gx) * tl.load(rstd_ptr + row) / N)


@triton.jit
def _rows(dy_ptr, new_ptr, mean_ptr, rstd_ptr, stride_dym, rows, cols, M, N, CENTRED: tl.constexpr):
    """Of a tile: dy, xhat and rstd."""
    mask_m = rows < M
    mask = mask_m[:, None] & (cols < N)[None, :]
    new_ptrs = new_ptr + rows[:, None] * N + cols[None, :]
    dy_ptrs = dy_ptr + rows[:, None] * stride_dym + cols[None, :]
    new = tl.load(new_ptrs, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)[:, None]
    if CENTRED:
        new -= tl.load(mean_ptr + rows, mask=mask_m, other=0.0)[:, None]
    return dy, tl.where(mask, new * rstd, 0.0), rstd


@triton.jit
def _means(g, xhat, mean_g_ptr, mean_gx_ptr, rows, M, N, CENTRED: tl.constexpr):
    """Of a tile's rows: the means that their gradient needs, given where a tile is only a part."""
    mean_g = tl.zeros_like(rows).to(tl.float32)
    if mean_gx_ptr is None:
        mean_gx = tl.sum(g * xhat, 1) / N
        if CENTRED:
            mean_g = tl.sum(g, 1) / N
    else:
        mean_gx = tl.load(mean_gx_ptr + rows, mask=rows < M, other=0.0)
        if CENTRED:
            mean_g = tl.load(mean_g_ptr + rows, mask=rows < M, other=0.0)
    return mean_g[:, None], mean_gx[:, None]


@triton.jit
def _gain(weight_ptr, cols, N, weight_offset, BLOCK_N: tl.constexpr):
    """What xhat is multiplied by, as one row."""
    ones = tl.full([1, BLOCK_N], 1, tl.float32)
    return _affine(ones, weight_ptr, None, cols, cols < N, weight_offset)


@triton.jit
def _store_part(part_ptr, part, program, N, cols, mask_n):
    """Stores the program's sum over its rows, where one is wanted."""
    if part_ptr is not None:
        tl.store(part_ptr + program * N + cols, tl.sum(part, 0), mask=mask_n)


@triton.jit
def _backward_kernel(
    dy_ptr, dnew_ptr, new_ptr, weight_ptr, mean_ptr, rstd_ptr, mean_g_ptr, mean_gx_ptr, seed_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    stride_dym, stride_dnm, M, N, weight_offset, threshold, scale,
    CENTRED: tl.constexpr, READS_TWICE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program takes every num_programs-th tile of rows, and sums its part of the parameters'.

    A tile is whole rows, or one block of their columns where the row means are given.
    READS_TWICE: only the sums stay in registers; a row comes again from the cache for its gradient.
    """
    program = tl.program_id(0).to(tl.int64)  # row offsets can pass 2^31
    start = tl.program_id(1) * BLOCK_N
    cols = start + tl.arange(0, BLOCK_N)
    mask_n = cols < N

    if not READS_TWICE:
        gain = _gain(weight_ptr, cols, N, weight_offset, BLOCK_N)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & mask_n[None, :]
        offsets = rows[:, None] * N + cols[None, :]
        d = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if dy_ptr is not None:
            dy, xhat, rstd = _rows(
                dy_ptr, new_ptr, mean_ptr, rstd_ptr, stride_dym, rows, cols, M, N, CENTRED
            )
            if READS_TWICE:
                g = dy * _gain(weight_ptr, cols, N, weight_offset, BLOCK_N)
            else:
                g = dy * gain
            mean_g, mean_gx = _means(g, xhat, mean_g_ptr, mean_gx_ptr, rows, M, N, CENTRED)
            if READS_TWICE:
                tl.debug_barrier()  # past it the compiler cannot know that memory is the same
                dy, xhat, rstd = _rows(
                    dy_ptr, new_ptr, mean_ptr, rstd_ptr, stride_dym, rows, cols, M, N, CENTRED
                )
                g = dy * _gain(weight_ptr, cols, N, weight_offset, BLOCK_N)
            d = rstd * (g - mean_g - xhat * mean_gx)
            dweight += dy * xhat
            dbias += dy
        if dnew_ptr is not None:
            dnew_ptrs = dnew_ptr + rows[:, None] * stride_dnm + cols[None, :]
            d += tl.load(dnew_ptrs, mask=mask, other=0.0).to(tl.float32)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offsets, d, mask=mask)
        if dx_ptr is not None:
            d = _dropout(d, seed_ptr, rows, start, N, threshold, scale, BLOCK_M, BLOCK_N)
            tl.store(dx_ptr + offsets, d, mask=mask)

    _store_part(dweight_ptr, dweight, program, N, cols, mask_n)
    _store_part(dbias_ptr, dbias, program, N, cols, mask_n)


# --- launch -------------------------------------------------------------------------------------


def _backward_tile(N: int, centred: bool, heavy: bool) -> tuple[dict[str, Any], int, bool]:
    """A tile, programs a multiprocessor, and whether a tile is whole rows: what does not spill.

    Heavy: dropout, or a float32 among the tensors. Its tiles are half as large, so that two blocks
    fit a multiprocessor: 114 us modelled on sm_90 for 8192 x 4096 in bfloat16 with dropout, against
    181 us for one. The widths were found by compiling (Triton 3.7.1, sm_80 to sm_120).
    """
    tile, per_multiprocessor = backward_tile(max(N, 4))
    if heavy:
        tile["BLOCK_M"] = max(1, tile["BLOCK_M"] // 2)
        per_multiprocessor = 2
    once = (WIDE_BACKWARD // 2 if heavy else WIDE_BACKWARD) >= N
    twice = not (once or centred or N % 16) and WIDE_BACKWARD * (1 if heavy else 2) >= N
    if not (once or twice):
        tile = {"BLOCK_M": 1, "BLOCK_N": 2048, "num_warps": 8}
    elif N > WIDE_BACKWARD:
        tile["num_warps"] = 32
    return tile | {"READS_TWICE": twice}, per_multiprocessor, once or twice


def _forward_fake(
    x: Tensor,
    residual: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    weight_offset: float,
    dropout_p: float,
    dtype: torch.dtype,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rstd = x.new_empty(x.shape[: x.dim() - len(shape)], dtype=torch.float32)
    mean = torch.empty_like(rstd) if centred else rstd.new_empty(0)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), mean, rstd


def _backward_fake(
    dy: Tensor | None,
    dnew: Tensor | None,
    new: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    weight_offset: float,
    dropout_p: float,
    centred: bool,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(t: Tensor | None, dtype: torch.dtype, wants: bool) -> Tensor:
        return new.new_empty(t.shape if t is not None and wants else 0, dtype=dtype)

    return (
        like(new, x_dtype, wanted[0]),
        like(new, residual_dtype, wanted[1]),
        like(weight, new.dtype if weight is None else weight.dtype, wanted[2]),
        like(bias, new.dtype if bias is None else bias.dtype, wanted[3]),
    )


@torch_op("add_norm_backward", fake=_backward_fake)
def _backward(
    dy: Tensor | None,
    dnew: Tensor | None,
    new: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    weight_offset: float,
    dropout_p: float,
    centred: bool,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dresidual, dweight, dbias = _backward_fake(
        dy, dnew, new, shape, weight, bias, mean, rstd, seed,
        weight_offset, dropout_p, centred, x_dtype, residual_dtype, wanted,
    )  # fmt: skip
    M, N = rstd.numel(), math.prod(shape)
    if M == 0 or N == 0:
        return dx.zero_(), dresidual.zero_(), dweight.zero_(), dbias.zero_()
    dy, dnew = (None if t is None else rows_of(t, N) for t in (dy, dnew))
    tensors = [t for t in (dy, dnew, new, weight) if t is not None]
    heavy = seed is not None or any(t.itemsize == 4 for t in tensors)
    tile, per_multiprocessor, whole_rows = _backward_tile(N, centred, heavy)
    programs = triton.cdiv(M, tile["BLOCK_M"])
    programs = min(programs, per_multiprocessor * multiprocessors(new.device))
    parts = [
        new.new_empty(programs, N, dtype=torch.float32) if wants else None for wants in wanted[2:]
    ]
    outputs = [t if wants else None for t, wants in zip((dx, dresidual), wanted[:2], strict=True)]
    stride_dym, stride_dnm = (0 if t is None else t.stride(0) for t in (dy, dnew))
    means: list[Tensor | None] = [None, None]
    if not whole_rows:
        means = [torch.empty_like(mean), torch.empty_like(rstd)]
        if dy is not None and any(wanted[:2]):
            _row_means_kernel[(M,)](
                dy, new, weight, mean, rstd, *means,
                stride_dym, N, weight_offset,
                CENTRED=centred, BLOCK_N=4096, num_warps=16,
            )  # fmt: skip
    _backward_kernel[(programs, triton.cdiv(N, tile["BLOCK_N"]))](
        dy, dnew, new, weight, mean, rstd, *means, seed,
        *outputs, *parts,
        stride_dym, stride_dnm, M, N, weight_offset,
        threshold_of(dropout_p), scale_of(dropout_p),
        CENTRED=centred, **tile,
    )  # fmt: skip
    if wanted[2] or wanted[3]:
        sum_parts(parts[0], parts[1], dweight if wanted[2] else None, dbias if wanted[3] else None)
    return dx, dresidual, dweight, dbias


def _save(ctx, inputs, output):
    x, residual, ctx.shape, weight, bias, seed, ctx.eps, *ctx.rest, _, ctx.centred = inputs
    ctx.dtypes = [x.dtype, residual.dtype]
    ctx.set_materialize_grads(False)  # an output that nobody used has None, and costs nothing
    ctx.save_for_backward(weight, bias, seed, *output[1:])


def _eager_gradients(ctx, dy, dnew, weight, bias, seed, new):
    """Of x, residual, weight and bias, for create_graph=True: new leads back to x and residual."""
    weight_offset, dropout_p = ctx.rest
    d, dweight, dbias = dnew, None, None
    if dy is not None:

        def norm(new: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            y = _norm(new, weight, bias, ctx.shape, ctx.eps, weight_offset, ctx.centred)
            return y.to(ctx.dtypes[0])

        d, dweight, dbias = eager_gradients(norm, (new, weight, bias), (dy,))
        d = d if dnew is None else d + dnew
    dx = d if seed is None else _dropped(d, math.prod(ctx.shape), dropout_p, seed)
    return dx.to(ctx.dtypes[0]), d.to(ctx.dtypes[1]), dweight, dbias


def _kernel_gradients(ctx, dy, dnew, weight, bias, seed, new, mean, rstd):
    """Of x, residual, weight and bias."""
    x, residual, *parameters = (ctx.needs_input_grad[i] for i in (0, 1, 3, 4))
    if dy is None and seed is None:
        return dnew.to(ctx.dtypes[0]), dnew.to(ctx.dtypes[1]), None, None
    one = seed is None and ctx.dtypes[0] == ctx.dtypes[1]
    wanted = [
        x and not one,
        residual or (x and one),
        *(wants and dy is not None for wants in parameters),
    ]
    found = _backward(
        dy, dnew, new, ctx.shape, weight, bias, mean, rstd, seed,
        *ctx.rest, ctx.centred, *ctx.dtypes, wanted,
    )  # fmt: skip
    dx, dresidual, dweight, dbias = (g if w else None for g, w in zip(found, wanted, strict=True))
    return dresidual if one else dx, dresidual, dweight, dbias


def _gradients(ctx, dy, dnew, _dmean, _drstd):
    weight, bias, seed, new, mean, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        grads = _eager_gradients(ctx, dy, dnew, weight, bias, seed, new)
    else:
        grads = _kernel_gradients(ctx, dy, dnew, weight, bias, seed, new, mean, rstd)
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3, 4)]
    dx, dresidual, dweight, dbias = (g if w else None for g, w in zip(grads, wanted, strict=True))
    return dx, dresidual, None, dweight, dbias, *[None] * 6


@torch_op("add_norm", fake=_forward_fake, setup_context=_save, backward=_gradients)
def _forward(
    x: Tensor,
    residual: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    weight_offset: float,
    dropout_p: float,
    dtype: torch.dtype,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, new, mean, rstd = _forward_fake(
        x, residual, shape, weight, bias, seed, eps, weight_offset, dropout_p, dtype, centred
    )
    M, N = rstd.numel(), math.prod(shape)
    if M == 0 or N == 0:
        return y, new, mean, rstd
    x, residual = rows_of(x, N), rows_of(residual, N)
    dropout = (threshold_of(dropout_p), scale_of(dropout_p))
    if N <= WIDE:
        tile = row_tile(max(N, 4))
        if seed is not None:
            tile["BLOCK_M"] = max(1, tile["BLOCK_M"] // 2)  # the generator needs registers too
        _forward_kernel[(triton.cdiv(M, tile["BLOCK_M"]),)](
            x, residual, weight, bias, seed, y, new, mean, rstd,
            x.stride(0), residual.stride(0), M, N, eps, weight_offset, *dropout,
            CENTRED=centred, **tile,
        )  # fmt: skip
    else:
        _forward_wide_kernel[(M,)](
            x, residual, weight, bias, seed, y, new, mean, rstd,
            x.stride(0), residual.stride(0), N, eps, weight_offset, *dropout,
            CENTRED=centred, BLOCK_N=4096, num_warps=8,
        )  # fmt: skip
    return y, new, mean, rstd


# --- public -------------------------------------------------------------------------------------


def _uncovered(
    dtypes: Sequence[torch.dtype],
    x: Tensor,
    residual: Tensor,
    shape: Sequence[int],
    dropout_p: float,
    residual_dtype: torch.dtype | None,
    **parameters: Tensor | None,
) -> str | None:
    if residual.shape != x.shape:
        return f"residual has shape {tuple(residual.shape)}, not {tuple(x.shape)}"
    if residual.dtype not in dtypes or (residual_dtype or residual.dtype) not in dtypes:
        return f"residual is {residual.dtype}, new_residual {residual_dtype or residual.dtype}"
    if residual.device != x.device:
        return f"residual is on {residual.device} and x on {x.device}"
    if not 0 <= dropout_p <= 1:
        return f"dropout_p is {dropout_p}"
    return uncovered_norm(dtypes, shape, x, **parameters)


def _fused(
    x: Tensor,
    residual: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    dropout_p: float,
    seed: Seed,
    dtype: torch.dtype | None,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y, new_residual, _, _ = _forward(
        x, residual, list(shape), weight, bias,
        as_seed(seed, x.device) if dropout_p else None,
        float(eps), float(weight_offset), float(dropout_p), dtype or residual.dtype, centred,
    )  # fmt: skip
    return y, new_residual


def _layer_uncovered(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: Seed = None,
    residual_dtype: torch.dtype | None = None,
) -> str | None:
    return _uncovered(
        OPS[0].dtypes, x, residual, normalized_shape, dropout_p, residual_dtype,
        weight=weight, bias=bias,
    )  # fmt: skip


@dispatched(eager=layer_reference, uncovered=_layer_uncovered)
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: Seed = None,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``new_residual = dropout(x) + residual`` and ``y = layer_norm(new_residual)`` in one pass.

    Args:
        x: (..., *normalized_shape) float32, float16 or bfloat16: a branch's output; any strides.
        residual: The shape of ``x``, any of the dtypes: the residual stream.
        normalized_shape: The trailing dimensions that share a mean and a variance.
        weight: ``normalized_shape``, any of the dtypes; None multiplies by 1.
        bias: ``normalized_shape``, any of the dtypes; None adds 0.
        eps: Added to the variance.
        dropout_p: Probability that an element of ``x`` is dropped. There is no training flag.
        seed: An int, or an int64 tensor of one element; the same seed drops the same elements.
            None draws one from PyTorch's generator, which activation checkpointing replays.
        residual_dtype: Of ``new_residual``; default that of ``residual``.

    Returns:
        ``y`` in the dtype of ``x``, and ``new_residual``. ``y`` is the norm of ``new_residual`` as
        rounded. Statistics are float32, gradients the same to the bit from run to run.

    Raises:
        ValueError: ``residual`` is not of the shape of ``x``, or ``dropout_p`` outside [0, 1].
        RuntimeError: What ``F.layer_norm`` raises, for shapes that do not fit.
    """
    return _fused(
        x, residual, normalized_shape, weight, bias, eps, 0.0,
        dropout_p, seed, residual_dtype, centred=True,
    )  # fmt: skip


def _rms_uncovered(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    seed: Seed = None,
    residual_dtype: torch.dtype | None = None,
) -> str | None:
    return _uncovered(
        OPS[1].dtypes, x, residual, normalized_shape, dropout_p, residual_dtype, weight=weight
    )


@dispatched(eager=rms_reference, uncovered=_rms_uncovered)
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    seed: Seed = None,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``new_residual = dropout(x) + residual`` and ``y = rms_norm(new_residual)`` in one pass.

    Args:
        x: (..., *normalized_shape) float32, float16 or bfloat16: a branch's output; any strides.
        residual: The shape of ``x``, any of the dtypes: the residual stream.
        normalized_shape: The trailing dimensions that share a mean square.
        weight: ``normalized_shape``, any of the dtypes; None multiplies by 1.
        eps: Added to the mean square; None is float32's epsilon.
        weight_offset: Added to ``weight`` in float32.
        dropout_p: As in ``add_layer_norm``.
        seed: As in ``add_layer_norm``.
        residual_dtype: Of ``new_residual``; default that of ``residual``.

    Returns:
        ``y`` in the dtype of ``x``, and ``new_residual``, as ``add_layer_norm``.

    Raises:
        ValueError: ``residual`` is not of the shape of ``x``, or ``dropout_p`` outside [0, 1].
        RuntimeError: What ``F.rms_norm`` raises, for shapes that do not fit.
    """
    return _fused(
        x, residual, normalized_shape, weight, None, EPS if eps is None else eps, weight_offset,
        dropout_p, seed, residual_dtype, centred=False,
    )  # fmt: skip


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype,
    device: torch.device,
    M: int,
    N: int,
    names: Sequence[str],
    residual: torch.dtype | None = None,
    **more: float,
) -> Inputs:
    x = torch.randn(M, N, dtype=dtype, device=device)
    stream = 3 * torch.randn(M, N, dtype=residual or dtype, device=device) + 1
    inputs: Inputs = {"x": x.requires_grad_(), "residual": stream.requires_grad_()}
    inputs["normalized_shape"] = (N,)
    for name in names:
        inputs[name] = torch.randn(N, dtype=dtype, device=device).requires_grad_()
    return inputs | more


def _work(x: Tensor, residual: Tensor, **more: Any) -> tuple[int, int]:
    """Reads x and residual, writes y and new_residual."""
    dtype = more.get("residual_dtype") or residual.dtype
    parameters = sum(t.nbytes for t in more.values() if isinstance(t, Tensor))
    new_bytes = x.numel() * dtype.itemsize
    return 2 * x.nbytes + residual.nbytes + new_bytes + parameters, 9 * x.numel()


_SIZES: Sequence[dict[str, Any]] = (
    {"M": 1, "N": 1, "dropout_p": 0.5, "seed": 1},
    {"M": 13, "N": 300, "dropout_p": 0.25, "seed": 2**40 + 7},
    {"M": 37, "N": 66, "residual": torch.float32},
    {"M": 1, "N": 16402},
)
_BENCH_SIZES = (
    *({"M": 8192, "N": 2**k} for k in range(10, 15)),
    {"M": 8192, "N": 4096, "dropout_p": 0.1, "seed": 1},
    {"M": 2048, "N": 65536},
)

OPS = (
    Op(
        fused=add_layer_norm,
        reference=layer_reference,
        example=functools.partial(_example, names=("weight", "bias")),
        sizes=_SIZES,
        bench_sizes=_BENCH_SIZES,
        work=_work,
    ),
    Op(
        fused=add_rms_norm,
        reference=rms_reference,
        example=functools.partial(_example, names=("weight",), eps=1e-6),
        sizes=(*_SIZES[1:3], {"M": 1, "N": 8208}),
        bench_sizes=_BENCH_SIZES,
        work=_work,
    ),
)
