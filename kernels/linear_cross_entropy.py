r"""Cross-entropy of x Wᵀ + bias without the logits of all rows in memory.

``impl="chunked"`` takes some rows at a time: a product of matrices gives their logits, one kernel
turns these into losses and, in place, into ds, the gradient of the sum of losses by them (see
``cross_entropy.py``), and two more products give dx and add to dW, in float32. So all the work is
done in the forward; the backward multiplies by what arrives: 6 NHV floating-point operations and
8 to 10 bytes a logit. Kept for the backward: dx, and dW in float32.

``impl="recompute"`` keeps no logits and no gradients, only 8 bytes a row, for 8 NHV operations
(see ``_logit_tiles.py``). It also serves ``reduction="none"``, whose gradient is not known in the
forward, and a vocabulary that is spread over processes: there each rank holds some rows of W,
maxima and sums of all ranks are joined once, and dx is summed over ranks in the backward.

Where no kernel runs, PyTorch's ops take the same steps with the same bound on memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from . import _dispatch, _logit_tiles
from ._dispatch import dispatched
from ._launch import rows_of
from ._logit_tiles import accumulate, add_rows, multiply
from ._op import Inputs, Op
from ._register import eager_gradients, torch_op
from .cross_entropy import (
    aligned_part,
    capped,
    check_extensions,
    lane_of,
    row_loss,
    row_options,
    row_statistics,
    row_target,
    uncovered_classes,
    write_gradient,
)
from .cross_entropy import reference as cross_entropy_reference


def reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    chunk_size: int | None = None,
    impl: str = "chunked",
    process_group: Any = None,
) -> Tensor:
    """The loss in eager PyTorch, all logits at once; ranks, chunks and ``impl`` do not matter."""
    shape = _logits_shape(input, linear_weight, target, linear_bias, ignore_index)
    matrix = linear_weight.reshape(-1, linear_weight.shape[-1])
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    loss = cross_entropy_reference(
        F.linear(input, matrix, bias).reshape(shape),
        target,
        weight,
        reduction=reduction,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
    )
    assert isinstance(loss, Tensor)
    return loss


def _logits_shape(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    ignore_index: int | None,
) -> tuple[int, ...]:
    """The shape of the logits; raises what ``F.linear_cross_entropy`` raises, in its words."""
    if input.dim() < 1 or input.dim() > 2:
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}"
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    classes, *out_features = linear_weight.shape[:-1]
    if linear_bias is not None and tuple(linear_bias.shape) != (classes, *out_features):
        raise RuntimeError(
            f"expected linear_bias shape {(classes, *out_features)}, got {tuple(linear_bias.shape)}"
        )
    if out_features and input.dim() == 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} "
            f"requires batched input, (N, {input.shape[-1]}), got unbatched input with shape "
            f"{tuple(input.shape)}"
        )
    shape = (*input.shape[:-1], classes, *out_features)
    if target.shape == shape and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    return shape


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
        z_y = capped(z_y, softcap)
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


# --- rows ---------------------------------------------------------------------------------------
# Vectors of N: too little to launch kernels of our own for. In float32, or float64 for float64.


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _targets_of(
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    offset: int,
    V: int,
    classes: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's class among V here or -1, whether it counts, and w_y: NaN for no class at all."""
    counts = target != ignore_index
    y = target - offset
    here = counts & (y >= 0) & (y < V)
    y = torch.where(here, y, -1)
    share = here.to(dtype)
    if weight is not None:
        share = share * weight.to(dtype)[y.clamp(min=0)]
    missing = counts & ((target < 0) | (target >= classes))
    return y, counts, share.masked_fill(missing, float("nan"))


def _losses_of(m, d, z_y, pull, share, counts, mass, spread, smoothing, z_loss):
    """Each row's loss."""
    log_d = d.log()
    lse = m + log_d
    loss = (1.0 - smoothing) * share * (log_d - (z_y - m))
    if pull is not None:
        loss = loss + mass * lse - spread * pull
    if z_loss:
        loss = loss + z_loss * share * lse * lse
    return torch.where(counts, loss, 0.0)


def _coefficients_of(g, m, d, share, counts, mass, spread, smoothing, z_loss):
    """a, b and c of ``ds = a exp(z - m) - b [c = y] - c w`` for each row, from its gradient."""
    a = (1.0 - smoothing) * share + mass
    if z_loss:
        a = a + 2.0 * z_loss * share * (m + d.log())
    a = torch.where(counts, g * a / d, 0.0)
    b = torch.where(counts, g * (1.0 - smoothing) * share, 0.0)
    return a, b, torch.where(counts, g * spread, 0.0) if smoothing else None


# --- eager --------------------------------------------------------------------------------------


def _eager_logits(x: Tensor, matrix: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    z = F.linear(x, matrix, bias)
    z = z.to(_wide(z.dtype))
    return z.div_(softcap).tanh_().mul_(softcap) if softcap else z


def _eager_statistics(
    z: Tensor, y: Tensor, weight: Tensor | None, wants_pull: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of each row of logits: m, d, the target's logit (0 if it is not here), and sum(w z)."""
    m = z.amax(1)
    shift = torch.where(m == float("-inf"), 0.0, m)
    d = (z - shift[:, None]).exp_().sum(1)
    z_y = torch.where(y < 0, 0.0, z.gather(1, y.clamp(min=0)[:, None])[:, 0])
    pull = None
    if wants_pull:
        pull = z.sum(1) if weight is None else z @ weight.to(z.dtype)
    return m, d, z_y, pull


def _eager_gradient_(
    z: Tensor,
    y: Tensor,
    weight: Tensor | None,
    softcap: float,
    m: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
) -> Tensor:
    """Turns logits into ds, in place."""
    slope = 1.0 - (z / softcap).square_() if softcap else None
    ds = z.sub_(m[:, None]).exp_().mul_(a[:, None])
    ds.scatter_add_(1, y.clamp(min=0)[:, None], torch.where(y < 0, 0.0, -b)[:, None])
    if c is not None:
        ds.sub_(c[:, None] if weight is None else c[:, None] * weight.to(z.dtype))
    return ds if slope is None else ds.mul_(slope)


# --- launch -------------------------------------------------------------------------------------

# Logits that are held at once, in bytes; unmeasured. Fewer rows read and write dW more often: with
# 1024 rows of H = 4096 that is a modelled third of the time of the products on sm_90.
CHUNK_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}


def _chunks(x: Tensor, V: int, rows: int | None) -> list[slice]:
    """Rows by equal shares that keep within ``rows``, or within the budget of memory."""
    N = x.shape[0]
    if rows is None:
        rows = max(CHUNK_BYTES.get(x.device.type, CHUNK_BYTES["cuda"]) // (V * x.itemsize), 1)
    number = triton.cdiv(N, rows)
    rows = triton.cdiv(N, number)
    if rows > 128 and number > 1:
        rows = rows // 128 * 128
    return [slice(start, min(start + rows, N)) for start in range(0, N, rows)]


def _check_targets(target: Tensor, ignore_index: int, V: int) -> None:
    """On the CPU, where PyTorch raises, so does this."""
    if target.device.type == "cpu":
        missing = target[(target != ignore_index) & ((target < 0) | (target >= V))]
        if missing.numel():
            raise IndexError(f"Target {int(missing[0])} is out of bounds.")


def _empty_gradients(input, matrix, bias, wanted, dtypes):
    return tuple(
        t.new_empty(t.shape, dtype=dtype) if t is not None and w else input.new_empty(0)
        for t, w, dtype in zip((input, matrix, bias), wanted, dtypes, strict=True)
    )


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
    wide = _wide(input.dtype)
    sums = (input.new_empty((), dtype=wide) for _ in range(2))
    return *sums, *_empty_gradients(input, matrix, bias, wanted, (input.dtype, wide, wide))


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
def _chunked(
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
    losses, shares = x.new_empty(2, x.shape[0], dtype=_wide(x.dtype)).unbind()
    chunks = _chunks(x, V, chunk_size)
    if fused:
        lane = lane_of(x)
        width = triton.cdiv(V, lane) * lane  # rows of logits start at 16-byte boundaries
        room = x.new_empty(chunks[0].stop, width)[:, :V]
    else:
        _check_targets(target, ignore_index, V)
    for chunk in chunks:
        if fused:
            ds = room[: chunk.stop - chunk.start]
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
                losses[chunk], shares[chunk], any(wanted),
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
) -> Tensor:
    """What ``_chunk_kernel`` does; gives the logits, or ds in their place."""
    V = matrix.shape[0]
    z = _eager_logits(x, matrix, bias, softcap)
    y, counts, share = _targets_of(target, weight, ignore_index, 0, V, V, z.dtype)
    spread, mass = _masses(weight, smoothing, V, "")
    m, d, z_y, pull = _eager_statistics(z, y, weight, smoothing > 0.0)
    rest = (share, counts, mass, spread, smoothing, z_loss)
    losses.copy_(_losses_of(m, d, z_y, pull, *rest))
    shares.copy_(share)
    if not writes:
        return z
    return _eager_gradient_(z, y, weight, softcap, m, *_coefficients_of(1.0, m, d, *rest))


def _masses(weight: Tensor | None, smoothing: float, classes: int, group: str) -> tuple[float, Any]:
    """The q of a class without its weight, s / V, and the sum of q over classes."""
    spread = smoothing / classes
    if weight is None or not smoothing:
        return spread, smoothing
    total = weight.sum(dtype=_wide(weight.dtype))
    if group:
        dist.all_reduce(total, group=_group(group))
    return spread, spread * total


def _group(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)


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
        return input.new_empty(input.shape[0], dtype=_wide(input.dtype))

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
    return _empty_gradients(input, matrix, bias, wanted, dtypes)


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
    y, counts, _ = _targets_of(target, weight, ignore_index, offset, V, classes, m.dtype)
    spread, mass = _masses(weight, smoothing, classes, group)
    rest = (share, counts, mass, spread, smoothing, z_loss)
    rows = (m, *_coefficients_of(dlosses, m, d, *rest))
    find = _logit_tiles.gradients if fused else _eager_gradients_of
    dx, dmatrix, dbias = find(x, w, bias, y, weight, softcap, rows, chunk_size, tuple(wanted))
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
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What ``_logit_tiles.gradients`` does, some rows at a time; all in float32 or better."""
    wide = _wide(x.dtype)
    dx, dmatrix, dbias = (
        t.new_empty(t.shape, dtype=wide) if t is not None and w else None
        for t, w in zip((x, matrix, bias), wanted, strict=True)
    )
    for chunk in _chunks(x, matrix.shape[0], chunk_size):
        z = _eager_logits(x[chunk], matrix, bias, softcap)
        of_chunk = [None if r is None else r[chunk] for r in rows]
        ds = _eager_gradient_(z, y[chunk], weight, softcap, *of_chunk)
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
def _rows(
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
    y, counts, share = _targets_of(
        target, weight, ignore_index, offset, V, classes, _wide(input.dtype)
    )
    if fused:
        found = _logit_tiles.statistics(x, w, bias, y, weight, softcap, smoothing > 0.0)
    else:
        _check_targets(target, ignore_index, classes)
        parts = []
        for chunk in _chunks(x, V, chunk_size):
            z = _eager_logits(x[chunk], w, bias, softcap)
            parts.append(_eager_statistics(z, y[chunk], weight, smoothing > 0.0))
        found = tuple(
            None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True)
        )
    m, d, z_y, pull = found
    if group:
        m, d, z_y, share, pull = _over_ranks(_group(group), m, d, z_y, share, pull)
    spread, mass = _masses(weight, smoothing, classes, group)
    losses = _losses_of(m, d, z_y, pull, share, counts, mass, spread, smoothing, z_loss)
    return losses, share, m, d


def _over_ranks(group, m, d, z_y, share, pull):
    """Joins the statistics of every rank's part of the vocabulary: one maximum and one sum."""
    top = m.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    d = torch.where(m == float("-inf"), 0.0, d * (m - top).exp())
    sums = torch.stack([d, z_y, share] if pull is None else [d, z_y, share, pull])
    dist.all_reduce(sums, group=group)
    return top, sums[0], sums[1], sums[2], None if pull is None else sums[3]


# --- public -------------------------------------------------------------------------------------


def _unchunked(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    chunk_size: int | None = None,
    impl: str = "chunked",
    process_group: Any = None,
) -> str | None:
    """Why a call takes all logits at once, in PyTorch's own ops, or None."""
    if input.dim() not in (1, 2) or linear_weight.dim() != 2:
        return f"input has {input.dim()} dimensions and linear_weight {linear_weight.dim()}"
    if input.numel() == 0 or linear_weight.numel() == 0:
        return "input or linear_weight is empty"
    if target.dtype != torch.int64 or target.shape != input.shape[:-1]:
        return f"target is {target.dtype} of shape {tuple(target.shape)}"
    if input.shape[-1] != linear_weight.shape[-1]:
        return "the last dimensions of input and linear_weight differ"
    classes = linear_weight.shape[0]
    if linear_bias is not None and tuple(linear_bias.shape) != (classes,):
        return f"linear_bias has shape {tuple(linear_bias.shape)}"
    if reduction not in ("none", "mean", "sum"):
        return f"reduction is {reduction!r}"
    autocast = torch.is_autocast_enabled(input.device.type)
    for name, t in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if t is not None and (t.device != input.device or not (t.dtype == input.dtype or autocast)):
            return f"{name} is {t.dtype} on {t.device}, input {input.dtype} on {input.device}"
    if not input.is_floating_point() or target.device != input.device:
        return f"input is {input.dtype} on {input.device}, target on {target.device}"
    given = [t for t in (input, linear_weight, target, linear_bias, weight) if t is not None]
    return _dispatch._foreign(given) or uncovered_classes(
        input.dtype, classes, target, weight, label_smoothing
    )


def _uncovered(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> str | None:
    if input.dtype not in OP.dtypes:
        return f"input is {input.dtype}"
    return _unchunked(input, linear_weight, target, **options)


def _checked(options: dict[str, Any]) -> None:
    """Refuses what PyTorch does not have where it is out of range."""
    check_extensions(
        "linear_cross_entropy", options.get("z_loss", 0.0), options.get("softcap", 0.0)
    )
    impl, rows = options.get("impl", "chunked"), options.get("chunk_size")
    if impl not in ("chunked", "recompute"):
        raise ValueError(
            f"linear_cross_entropy: impl must be 'chunked' or 'recompute'; got {impl!r}"
        )
    if rows is not None and rows < 1:
        raise ValueError(f"linear_cross_entropy: chunk_size must be 1 or more; got {rows}")


def _eager(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The same steps in PyTorch's ops; all logits at once where a call needs that."""
    _checked(options)
    reason = _unchunked(input, linear_weight, target, **options)
    if reason is None:
        return _in_parts(input, linear_weight, target, fused=False, **options)
    if options.get("process_group") is not None:
        raise ValueError(
            "linear_cross_entropy: process_group must come with class numbers and (V, H) weights; "
            f"got a call that takes all logits at once: {reason}"
        )
    return reference(input, linear_weight, target, **options)


def _in_parts(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    fused: bool,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    chunk_size: int | None = None,
    impl: str = "chunked",
    process_group: Any = None,
) -> Tensor:
    dtype = input.dtype
    if torch.is_autocast_enabled(input.device.type):  # a product in half, a loss in float32
        half = torch.get_autocast_dtype(input.device.type)
        dtype = torch.promote_types(dtype, torch.float32)
        input, linear_weight = input.to(half), linear_weight.to(half)
        linear_bias = None if linear_bias is None else linear_bias.to(half)
    if options is not None and chunk_size is None:
        chunk_size = options.batch_chunk_size
    group = "" if process_group is None else process_group.group_name
    wanted = [
        t is not None and t.requires_grad and torch.is_grad_enabled()
        for t in (input, linear_weight, linear_bias)
    ]
    arguments = (
        input.reshape(-1, input.shape[-1]), linear_weight, linear_bias, target.reshape(-1), weight,
        -100 if ignore_index is None else ignore_index, label_smoothing, z_loss, softcap,
        chunk_size,
    )  # fmt: skip
    if impl == "recompute" or reduction == "none" or group:
        losses, shares, _, _ = _rows(*arguments, group, fused)
        if reduction == "none":
            return losses.to(dtype).reshape(target.shape)
        loss, share = losses.sum(), shares.sum()
    else:
        loss, share, *_ = _chunked(*arguments, wanted, fused)
    if reduction == "mean":
        # Without a row that counts the loss is NaN and its gradient 0, as PyTorch.
        share = share.detach()
        mean = loss / torch.where(share == 0, 1.0, share)
        loss = torch.where(share == 0, float("nan"), mean)
    return loss.to(dtype)


@dispatched(eager=_eager, uncovered=_uncovered)
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    chunk_size: int | None = None,
    impl: str = "chunked",
    process_group: Any = None,
) -> Tensor:
    """``cross_entropy(input @ linear_weight.T + linear_bias, target)``, logits never whole.

    Drop-in for ``F.linear_cross_entropy`` of torch 2.13; also where torch has none.

    Args:
        input: (N, H) or (H), float32, float16 or bfloat16.
        linear_weight: (V, H). (V, d1, ..., H) goes by PyTorch's ops, all logits at once.
        target: (N) or (), int64. Probabilities go by PyTorch's ops.
        linear_bias: (V).
        weight: (V), a factor of each class.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index: Class number of rows that do not count; None is -100.
        label_smoothing: Share of the target spread over all classes, in [0, 1].
        options: A ``torch.nn.LinearCrossEntropyOptions``: its ``batch_chunk_size`` is
            ``chunk_size``. The rest does not apply: sums are float32, graphs may be retained.
        z_loss: As in ``cross_entropy``.
        softcap: As in ``cross_entropy``.
        chunk_size: Rows whose logits are held at once; by default 512 MiB of them, 64 on the CPU.
            Where the kernels recompute: columns that the backward holds of all rows; by default
            128 MiB of them.
        impl: ``"chunked"``: gradients are computed with the loss, and kept. ``"recompute"``: no
            logits in the forward and nothing kept, for a third more operations.
            ``reduction="none"`` and ``process_group`` always recompute.
        process_group: Ranks that each hold the next V rows of the vocabulary: ``linear_weight``,
            ``linear_bias`` and ``weight`` are this rank's, as many rows on each; ``input`` and
            ``target``, with numbers in the whole vocabulary, are the same on all. Every rank gets
            the loss, its own dW, and the whole gradient of ``input``.

    Returns:
        The loss, the dtype of ``input``; float32 under autocast, whose products are in half
        precision. Gradients of the weights are summed in float32. Targets to ignore and outside
        [0, V): as in ``cross_entropy``.

    Raises:
        RuntimeError: What ``F.linear_cross_entropy`` raises, for shapes that do not fit.
        ValueError: An option of ours out of range; ``process_group`` for all logits at once.
    """
    _checked({"z_loss": z_loss, "softcap": softcap, "chunk_size": chunk_size, "impl": impl})
    return _in_parts(
        input, linear_weight, target, fused=True, linear_bias=linear_bias, weight=weight,
        reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
        options=options, z_loss=z_loss, softcap=softcap, chunk_size=chunk_size, impl=impl,
        process_group=process_group,
    )  # fmt: skip


class ProjectedLoss(nn.Module):
    """Parameters and fields of ``nn.LinearCrossEntropyLoss``, for versions of torch without it."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        super().__init__()
        width = num_classes
        for size in out_features:
            width *= size
        self.num_classes, self.out_features, self.reduction = num_classes, out_features, reduction
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.options = options
        self.register_buffer("weight", weight)
        self.linear = nn.Linear(in_features, width, bias=bias, device=device, dtype=dtype)


_Base: Any = getattr(nn, "LinearCrossEntropyLoss", ProjectedLoss)


class LinearCrossEntropyLoss(_Base):
    """``torch.nn.LinearCrossEntropyLoss`` over the fused ``linear_cross_entropy``.

    The same arguments, parameters and state_dict; with ``z_loss``, ``softcap``, ``chunk_size`` and
    ``impl`` of that function.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        chunk_size: int | None = None,
        impl: str = "chunked",
        **options: Any,
    ) -> None:
        super().__init__(in_features, num_classes, **options)
        self.extensions = {
            "z_loss": z_loss,
            "softcap": softcap,
            "chunk_size": chunk_size,
            "impl": impl,
        }
        _checked(self.extensions)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of what the linear layer makes of ``input``."""
        linear, shape = self.linear, (self.num_classes, *self.out_features)
        return linear_cross_entropy(
            input,
            linear.weight.reshape(*shape, linear.in_features),
            target,
            linear_bias=None if linear.bias is None else linear.bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            **self.extensions,
        )


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype,
    device: torch.device,
    N: int,
    H: int,
    V: int,
    bias: bool = False,
    weighted: bool = False,
    **options: Any,
) -> Inputs:
    x = torch.randn(N, H, dtype=dtype, device=device)
    matrix = torch.randn(V, H, dtype=dtype, device=device) * (2 / H**0.5)
    target = torch.randint(0, V, (N,), device=device)
    target[N // 2 : N // 2 + N // 4] = -100
    inputs: Inputs = {
        "input": x.requires_grad_(),
        "linear_weight": matrix.requires_grad_(),
        "target": target,
        **options,
    }
    if bias:
        inputs["linear_bias"] = torch.randn(V, dtype=dtype, device=device).requires_grad_()
    if weighted:
        inputs["weight"] = torch.rand(V, dtype=dtype, device=device) + 0.5
    return inputs


OP = Op(
    fused=linear_cross_entropy,
    reference=reference,
    example=_example,
    sizes=(
        {"N": 1, "H": 1, "V": 1},
        {"N": 7, "H": 40, "V": 131, "bias": True, "label_smoothing": 0.1, "chunk_size": 3},
        {
            "N": 37,
            "H": 33,
            "V": 150,
            "bias": True,
            "weighted": True,
            "label_smoothing": 0.1,
            "softcap": 3.0,
            "z_loss": 1e-2,
            "impl": "recompute",
            "chunk_size": 64,
        },
    ),
    bench_sizes=(
        {"N": 8192, "H": 768, "V": 50257},
        {"N": 8192, "H": 768, "V": 50257, "impl": "recompute"},
        {"N": 8192, "H": 2048, "V": 32000, "impl": "recompute"},
    ),
    work=lambda input, linear_weight, **_: (
        input.nbytes + linear_weight.nbytes,
        2 * input.numel() * linear_weight.shape[0],
    ),
)
