"""A chunk of rows at a time: its logits, its losses, and at once its share of the gradients."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import rows_of
from .._register import eager_gradients, torch_op
from ..cross_entropy import (
    aligned_part,
    capped,
    lane_of,
    row_loss,
    row_options,
    row_statistics,
    row_target,
    write_gradient,
)
from .eager import (
    check_targets,
    chunks_of,
    coefficients_of,
    empty_gradients,
    into_gradient_,
    into_statistics_,
    logits_of,
    losses_of,
    masses_of,
    reference,
    slope_of,
    targets_of,
    wide_dtype,
)
from .tiles import accumulate, add_rows, multiply

# --- kernels ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["ignore_index"])
def _chunk_kernel(
    x_ptr, target_ptr, weight_ptr, loss_ptr, share_ptr,
    stride_xm, V, ignore_index, smoothing, z_loss, softcap,
    WRITES: tl.constexpr, HAS_MASS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """One program a row: its loss and, under WRITES, the gradient of that over the logits."""
    row = tl.program_id(0).to(tl.int64)
    y, counts, share = row_target(target_ptr, weight_ptr, row, V, ignore_index)
    read = tl.where(counts, V, 0)
    begin, lead, count = aligned_part(row, stride_xm, read, EVEN, LANE)
    z_y = tl.load(x_ptr + begin + y).to(tl.float32)
    if HAS_SOFTCAP:
        z_y, _ = capped(z_y, softcap)
    pivot = tl.where(z_y == float("-inf"), 0.0, z_y)
    m, d, mass, pull = row_statistics(
        x_ptr, weight_ptr, None,
        begin, lead, count, read, pivot, smoothing, smoothing / V, softcap,
        False, HAS_MASS, HAS_SOFTCAP, EVEN, BLOCK, LANE,
    )  # fmt: skip
    keep = 1.0 - smoothing
    loss = row_loss(m, d, mass, pull, z_y, pivot, share, keep, z_loss)
    tl.store(loss_ptr + row, tl.where(counts, loss, 0.0))
    tl.store(share_ptr + row, share)
    if WRITES:
        a = (keep * share + mass + 2.0 * z_loss * share * (m + tl.log(d))) / d
        g = tl.where(counts, 1.0, 0.0)
        begin, lead, count = aligned_part(row, stride_xm, V, EVEN, LANE)
        write_gradient(
            x_ptr, x_ptr, weight_ptr, None,
            begin, begin, lead, count, V, read, y,
            tl.where(counts, m, 0.0), tl.where(counts, a, 0.0), keep * share, g,
            smoothing, smoothing / V, softcap,
            False, HAS_MASS, HAS_SOFTCAP, EVEN, BLOCK, LANE,
        )  # fmt: skip


# --- launch -------------------------------------------------------------------------------------


def _chunked_fake(
    input: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    chunk_size: int | None,
    wanted: Sequence[bool],
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = wide_dtype(input.dtype)
    sums = (input.new_empty((), dtype=wide) for _ in range(2))
    return *sums, *empty_gradients(input, matrix, bias, wanted, (input.dtype, wide, wide))


def _save_chunked(ctx, inputs, output):
    input, matrix, bias, target, weight, *ctx.options, _, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, matrix, bias, target, weight, *output[2:])


def _sum_reference(input, matrix, bias, target, weight, ignore_index, smoothing, z_loss, softcap):
    return reference(
        input,
        matrix,
        target,
        linear_bias=bias,
        weight=weight,
        reduction="sum",
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        z_loss=z_loss,
        softcap=softcap,
    )


def _scaled(gradient: Tensor, g: Tensor, like: Tensor) -> Tensor:
    """The gradient times what arrived, rounded once to the dtype of ``like``."""
    return torch.mul(gradient, g, out=torch.empty_like(gradient, dtype=like.dtype))


def _chunked_gradients(ctx, dloss, *_):
    *inputs, dx, dmatrix, dbias = ctx.saved_tensors
    nothing = (None,) * 9
    if dloss is None:
        return None, None, None, *nothing
    if torch.is_grad_enabled():  # create_graph=True
        found = eager_gradients(_sum_reference, (*inputs, *ctx.options), (dloss,))
        return *found[:3], *nothing
    saved = zip((dx, dmatrix, dbias), inputs, ctx.needs_input_grad, strict=False)
    return *(_scaled(d, dloss, t) if needs else None for d, t, needs in saved), *nothing


@torch_op(
    "linear_cross_entropy_chunked",
    fake=_chunked_fake,
    setup_context=_save_chunked,
    backward=_chunked_gradients,
)
def chunked(
    input: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    chunk_size: int | None,
    wanted: Sequence[bool],
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum of losses, sum of w_y, and the gradients of the sum of losses that are wanted."""
    options = (ignore_index, smoothing, z_loss, softcap)
    _, _, dx, dmatrix, dbias = _chunked_fake(
        input, matrix, bias, target, weight, *options, chunk_size, wanted, fused
    )
    V, H = matrix.shape
    x, matrix, target = rows_of(input, H), rows_of(matrix, H), target.contiguous()
    bias, weight = (None if t is None else t.contiguous() for t in (bias, weight))
    losses, shares = x.new_empty(2, x.shape[0], dtype=wide_dtype(x.dtype)).unbind()
    chunks = chunks_of(x, V, chunk_size)
    lane = lane_of(x)
    width = triton.cdiv(V, lane) * lane  # rows of logits start at 16-byte boundaries
    room = x.new_empty(chunks[0].stop, width)[:, :V]
    if not fused:
        check_targets(target, ignore_index, V)
    for chunk in chunks:
        ds = room[: chunk.stop - chunk.start]
        if fused:
            multiply(x[chunk], matrix.T, out=ds, bias=bias)
            _chunk_kernel[(ds.shape[0],)](
                ds, target[chunk], weight, losses[chunk], shares[chunk],
                ds.stride(0), V, *options,
                WRITES=any(wanted), HAS_MASS=smoothing > 0.0, HAS_SOFTCAP=softcap > 0.0,
                **row_options(ds),
            )  # fmt: skip
        else:
            ds = _eager_chunk(
                x[chunk], matrix, bias, target[chunk], weight, *options,
                losses[chunk], shares[chunk], any(wanted), ds,
            )  # fmt: skip
        first = chunk.start == 0
        if wanted[0]:
            multiply(ds.to(x.dtype), matrix, out=dx[chunk])
        if wanted[1]:
            accumulate(dmatrix, ds.T, x[chunk], first)
        if wanted[2]:
            add_rows(dbias, ds, first)
    return losses.sum(), shares.sum(), dx, dmatrix, dbias


def _eager_chunk(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    losses: Tensor,
    shares: Tensor,
    writes: bool,
    room: Tensor,
) -> Tensor:
    """What ``_chunk_kernel`` does; gives ds, if it is wanted, in ``room`` where that is wide."""
    V = matrix.shape[0]
    z = logits_of(x, matrix, bias, softcap, room)
    y, counts, share = targets_of(target, weight, ignore_index, 0, V, V, z.dtype)
    spread, mass = masses_of(weight, smoothing, V)
    slope = slope_of(z, softcap) if writes else None
    m, d, z_y, pull = into_statistics_(z, y, weight, smoothing > 0.0)
    rest = (share, counts, mass, spread, smoothing, z_loss)
    losses.copy_(losses_of(m, d, z_y, pull, *rest))
    shares.copy_(share)
    if not writes:
        return z
    return into_gradient_(z, y, weight, slope, *coefficients_of(1.0, m, d, *rest))
