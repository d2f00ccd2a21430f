"""Losses row by row, nothing kept but statistics: logits are computed again in the backward.

Over a process group each rank has its part of the vocabulary, and joins its statistics with the
others' before the losses, its part of dx after the backward.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._launch import rows_of
from .._register import eager_gradients, torch_op
from . import tiles
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
from .tiles import accumulate, add_rows


def _group(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def _place(group: str, V: int) -> tuple[int, int]:
    """The first class of this rank, and the classes of all."""
    if not group:
        return 0, V
    ranks = _group(group)
    return dist.get_rank(ranks) * V, dist.get_world_size(ranks) * V


def _rows_fake(
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
    group: str,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def rows():
        return input.new_empty(input.shape[0], dtype=wide_dtype(input.dtype))

    return rows(), rows(), rows(), rows()


def _rows_backward_fake(
    dlosses: Tensor,
    input: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    share: Tensor,
    m: Tensor,
    d: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    chunk_size: int | None,
    group: str,
    fused: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dtypes = [t.dtype if t is not None else None for t in (input, matrix, bias)]
    return empty_gradients(input, matrix, bias, wanted, dtypes)


@torch_op("linear_cross_entropy_rows_backward", fake=_rows_backward_fake)
def _rows_backward(
    dlosses: Tensor,
    input: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    share: Tensor,
    m: Tensor,
    d: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    chunk_size: int | None,
    group: str,
    fused: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    nothing = input.new_empty(0)
    V, H = matrix.shape
    x, w, target = rows_of(input, H), rows_of(matrix, H), target.contiguous()
    bias, weight = (None if t is None else t.contiguous() for t in (bias, weight))
    offset, classes = _place(group, V)
    y, counts, _ = targets_of(target, weight, ignore_index, offset, V, classes, m.dtype)
    spread, mass = masses_of(weight, smoothing, classes, _group(group) if group else None)
    rest = (share, counts, mass, spread, smoothing, z_loss)
    rows = (m, *coefficients_of(dlosses, m, d, *rest))
    find = tiles.gradients if fused else _eager_gradients_of
    dx, dmatrix, dbias = find(x, w, bias, y, weight, softcap, rows, chunk_size, wanted)
    if dx is not None:
        if group:
            dist.all_reduce(dx, group=_group(group))
        dx = dx.to(input.dtype)
    found = zip((dx, dmatrix, dbias), (input, matrix, bias), strict=True)
    dx, dmatrix, dbias = (nothing if g is None or t is None else g.to(t.dtype) for g, t in found)
    return dx, dmatrix, dbias


def _eager_gradients_of(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    y: Tensor,
    weight: Tensor | None,
    softcap: float,
    rows: tuple[Tensor, Tensor, Tensor, Tensor | None],
    chunk_size: int | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What ``tiles.gradients`` does, some rows at a time; all in float32 or better."""
    wide = wide_dtype(x.dtype)
    dx, dmatrix, dbias = (
        t.new_empty(t.shape, dtype=wide) if t is not None and w else None
        for t, w in zip((x, matrix, bias), wanted, strict=True)
    )
    for chunk in chunks_of(x, matrix.shape[0], chunk_size):
        z = logits_of(x[chunk], matrix, bias, softcap)
        m, a, b, c = (None if r is None else r[chunk] for r in rows)
        assert m is not None
        assert a is not None
        assert b is not None
        slope = slope_of(z, softcap)
        ds = into_gradient_(z.sub_(m[:, None]).exp_(), y[chunk], weight, slope, a, b, c)
        if dx is not None:
            dx[chunk] = ds.to(x.dtype) @ matrix
        if dmatrix is not None:
            accumulate(dmatrix, ds.T, x[chunk], chunk.start == 0)
        if dbias is not None:
            add_rows(dbias, ds, chunk.start == 0)
    return dx, dmatrix, dbias


def _save_rows(ctx, inputs, output):
    *tensors, ctx.ignore_index, ctx.smoothing, ctx.z_loss, ctx.softcap, _, _, _ = inputs
    ctx.rest = inputs[9:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _losses_reference(*inputs):
    input, matrix, bias, target, weight, ignore_index, smoothing, z_loss, softcap = inputs
    return reference(
        input,
        matrix,
        target,
        linear_bias=bias,
        weight=weight,
        reduction="none",
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        z_loss=z_loss,
        softcap=softcap,
    )


def _rows_gradients(ctx, dlosses, *_):
    input, matrix, bias, target, weight, share, m, d = ctx.saved_tensors
    options = (ctx.ignore_index, ctx.smoothing, ctx.z_loss, ctx.softcap)
    nothing = (None,) * 9
    if dlosses is None:
        return None, None, None, *nothing
    if torch.is_grad_enabled():  # create_graph=True
        if ctx.rest[1]:
            raise RuntimeError(
                "linear_cross_entropy: there is no second derivative over a process group"
            )
        inputs = (input, matrix, bias, target, weight, *options)
        return *eager_gradients(_losses_reference, inputs, (dlosses,))[:3], *nothing
    wanted = list(ctx.needs_input_grad[:3])
    found = _rows_backward(
        dlosses, input, matrix, bias, target, weight, share, m, d, *options, *ctx.rest, wanted
    )
    return *(g if w else None for g, w in zip(found, wanted, strict=True)), *nothing


@torch_op(
    "linear_cross_entropy_rows", fake=_rows_fake, setup_context=_save_rows, backward=_rows_gradients
)
def rows_apart(
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
    group: str,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each row's loss, w_y, m and d."""
    V, H = matrix.shape
    x, w, target = rows_of(input, H), rows_of(matrix, H), target.contiguous()
    bias, weight = (None if t is None else t.contiguous() for t in (bias, weight))
    offset, classes = _place(group, V)
    y, counts, share = targets_of(
        target, weight, ignore_index, offset, V, classes, wide_dtype(input.dtype)
    )
    if fused:
        m, d, z_y, pull = tiles.statistics(x, w, bias, y, weight, softcap, smoothing > 0.0)
    else:
        check_targets(target, ignore_index, classes)
        parts: list[tuple[Any, ...]] = []
        for chunk in chunks_of(x, V, chunk_size):
            z = logits_of(x[chunk], w, bias, softcap)
            parts.append(into_statistics_(z, y[chunk], weight, smoothing > 0.0))
        m, d, z_y = (torch.cat([part[n] for part in parts]) for n in range(3))
        pull = torch.cat([part[3] for part in parts]) if smoothing else None
    if group:
        m, d, z_y, share, pull = _over_ranks(_group(group), m, d, z_y, share, pull)
    spread, mass = masses_of(weight, smoothing, classes, _group(group) if group else None)
    losses = losses_of(m, d, z_y, pull, share, counts, mass, spread, smoothing, z_loss)
    return losses, share, m, d


def _over_ranks(group, m, d, z_y, share, pull):
    """Joins the statistics of every rank's part of the vocabulary: one maximum and one sum."""
    top = m.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    d = torch.where(m == float("-inf"), 0.0, d * (m - top).exp())
    sums = torch.stack([d, z_y, share] if pull is None else [d, z_y, share, pull])
    dist.all_reduce(sums, group=group)
    return top, sums[0], sums[1], sums[2], None if pull is None else sums[3]
