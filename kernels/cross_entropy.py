r"""Cross-entropy of logits: every option of PyTorch's, z-loss, softcap, log-sum-exp.

Over the V logits x of a row, z = x, or softcap * tanh(x / softcap); m = max(z),
d = sum(exp(z - m)), lse = m + log(d). With the target y, class weights w, smoothing s and
q_c = w_c s / V, a row costs

    loss = (1 - s) w_y (lse - z_y) + sum_c q_c (lse - z_c) + z_loss w_y lse^2

or, where targets are probabilities t, the same without the first term, q_c = w_c ((1 - s) t_c +
s / V) and 1 for the last w_y. A row whose target is ignore_index costs 0. The mean divides by the
sum of w_y over the rows that count (by the rows, for probabilities).

m and log(d) are kept apart and differences of logits are taken first, so that a shift of the
logits by 1e6 costs no accuracy: lse itself, in float32, is known to 0.06 there.

Backward, with g the gradient of the row's loss and dlse that of its lse:

    dz_c = (g ((1 - s) w_y + sum(q) + 2 z_loss w_y lse) + dlse) exp(z_c - m) / d
           - g (1 - s) w_y [c = y] - g q_c

in float32, rounded once; times 1 - (z / softcap)^2 for dx.

Cost: the forward reads the logits, the backward reads them and writes their gradient: 6 bytes a
logit in half precision, bound by memory, one exponential a logit and pass; a softcap adds one
exponential and a quarter of a reciprocal. Rows to ignore are neither read nor computed. Saved for
the backward: the logits themselves and 8 bytes a row.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import _reduction

from ._dispatch import dispatched
from ._launch import rows_of
from ._maths import LOG2_E, exp, reciprocal
from ._op import Inputs, Op
from ._register import eager_gradients, torch_op
from ._tuned import tunable


def check_extensions(op: str, z_loss: float, softcap: float) -> None:
    """Raises where an option that PyTorch does not have is out of range."""
    for name, value in (("z_loss", z_loss), ("softcap", softcap)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{op}: {name} must be 0, for none, or positive; got {value}")


def result_dtype(input: Tensor) -> torch.dtype:
    """What a loss of these logits comes in: float32 under autocast, as PyTorch."""
    return torch.float32 if torch.is_autocast_enabled(input.device.type) else input.dtype


def reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    inplace_backward: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy in eager PyTorch; it never overwrites ``input``."""
    if z_loss == 0.0 and softcap == 0.0 and not return_lse:
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    check_extensions("cross_entropy", z_loss, softcap)
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    dtype = result_dtype(input)
    z = input if input.dtype == torch.float64 else input.float()
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    lse = z.logsumexp(min(1, z.dim() - 1))
    weight = None if weight is None else weight.to(z.dtype)
    loss = F.cross_entropy(
        z,
        target if target.dtype == torch.int64 else target.to(z.dtype),
        weight,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    if target.shape == input.shape:
        share = torch.ones_like(lse)
    else:
        counts = target != ignore_index
        share = counts.to(z.dtype)
        if weight is not None:
            share = share * weight[torch.where(counts, target, 0)]
    if z_loss:
        loss = loss + z_loss * share * torch.where(share == 0, 0.0, lse).square()
    if reduction != "none":
        loss = loss.sum() / share.sum() if reduction == "mean" else loss.sum()
    loss = loss.to(dtype)
    return (loss, lse) if return_lse else loss


# --- kernels ------------------------------------------------------------------------------------

# A row of logits is read LANE at a time: 16 bytes, from a 16-byte boundary. What lies before the
# first boundary in the row and past the last, its ends, is read apart; under EVEN rows have none.


@triton.jit
def aligned_part(row, stride, V, EVEN: tl.constexpr, LANE: tl.constexpr):
    """Where the row begins, the columns before its first boundary, and those up to the last."""
    begin = row * stride
    if EVEN:
        begin = tl.multiple_of(begin, LANE)
        lead = 0
        count = tl.multiple_of(V, LANE)
    else:
        lead = ((LANE - begin % LANE) % LANE).to(tl.int32)
        count = tl.maximum(V - lead, 0) // LANE * LANE
    return begin, lead, count


@triton.jit
def _ends(lead, count, V, LANE: tl.constexpr):
    """The columns outside the aligned part, and which of those there are."""
    i = tl.arange(0, 2 * LANE)
    cols = tl.where(i < LANE, i, lead + count + i - LANE)
    return cols, tl.where(i < LANE, i < tl.minimum(lead, V), cols < V)


@triton.jit
def _lanes(BLOCK: tl.constexpr, LANE: tl.constexpr):
    """Columns of a block, of which a thread takes whole lanes of LANE neighbours."""
    return tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]


@triton.jit
def _reciprocal(x, SHARED: tl.constexpr):
    """1 / x from 1 to 2."""
    if SHARED:  # one for four neighbours: 1 / a = b / ab
        a, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
        ab = a * b
        c, d = tl.split(tl.reshape(ab, [x.shape[0], x.shape[1] // 4, 2]))
        r = reciprocal(c * d)
        of_ab = tl.reshape(tl.join(r * d, r * c), ab.shape)
        return tl.reshape(tl.join(of_ab * b, of_ab * a), x.shape)
    return reciprocal(x)


@triton.jit
def capped(x, softcap, SHARED: tl.constexpr = False):
    """``softcap * tanh(x / softcap)`` and its slope: 1 - tanh^2 would cancel near the cap."""
    e = tl.exp2((-2.0 / softcap * LOG2_E) * tl.abs(x))
    r = _reciprocal(1.0 + e, SHARED)
    z = softcap * (1.0 - e) * r
    return tl.where(x < 0.0, -z, z), 4.0 * e * r * r


@triton.jit
def _logits(ptrs, mask, softcap, HAS_SOFTCAP: tl.constexpr, SHARED: tl.constexpr = False):
    """Logits in float32, capped, and the slope of the cap; -inf and 0 where the mask is off."""
    z = tl.load(ptrs, mask=mask, other=float("-inf")).to(tl.float32)
    slope = 1.0
    if HAS_SOFTCAP:
        z, slope = capped(z, softcap, SHARED)
        z = tl.where(mask, z, float("-inf"))
    return z, slope


@triton.jit
def _mass(weight_ptr, target_ptr, cols, mask, smoothing, spread, PROBS: tl.constexpr):
    """q: what each class weighs in the row's loss, beside the target's own term."""
    if PROBS:
        t = tl.load(target_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        q = (1.0 - smoothing) * t + spread
    else:
        q = tl.zeros(cols.shape, tl.float32) + spread
    if weight_ptr is not None:
        q *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, q, 0.0)


@triton.jit
def _join(m, d, z):
    """Takes a block of logits into the running maximum and sum of each lane."""
    new_m = tl.maximum(m, tl.max(z, 1))
    shift = tl.where(new_m == float("-inf"), 0.0, new_m)  # -inf less -inf would be NaN
    d = d * exp(m - shift) + tl.sum(exp(z - shift[:, None]), 1)
    return new_m, d


@triton.jit
def row_statistics(
    x_ptr, weight_ptr, target_ptr,
    begin, lead, count, V, pivot, smoothing, spread, softcap,
    PROBS: tl.constexpr, HAS_MASS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """m, d, sum(q) and sum(q (z - pivot)) of a row."""
    # A lane keeps its own maximum: nothing crosses threads before the end, and a thread computes
    # LANE + 1 exponentials for LANE logits.
    m = tl.full([BLOCK // LANE], float("-inf"), tl.float32)
    d = tl.zeros([BLOCK // LANE], tl.float32)
    mass = tl.zeros([BLOCK // LANE], tl.float32)
    pull = tl.zeros([BLOCK // LANE], tl.float32)
    lanes = _lanes(BLOCK, LANE)
    x_ptrs = x_ptr + tl.multiple_of(begin + lead, LANE) + lanes
    for start in range(0, count, BLOCK):
        mask = start + lanes < count
        z, _ = _logits(x_ptrs + start, mask, softcap, HAS_SOFTCAP, True)
        m, d = _join(m, d, z)
        if HAS_MASS:
            q = _mass(weight_ptr, target_ptr, lead + start + lanes, mask, smoothing, spread, PROBS)
            mass += tl.sum(q, 1)
            pull += tl.sum(tl.where(mask, q * (z - pivot), 0.0), 1)
    top = tl.max(m, 0)
    if not EVEN:
        cols, inside = _ends(lead, count, V, LANE)
        z_ends, _ = _logits(x_ptr + begin + cols, inside, softcap, HAS_SOFTCAP)
        top = tl.maximum(top, tl.max(z_ends, 0))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(d * exp(m - shift), 0)
    sum_q = tl.sum(mass, 0)
    sum_qz = tl.sum(pull, 0)
    if not EVEN:
        total += tl.sum(exp(z_ends - shift), 0)
        if HAS_MASS:
            q = _mass(weight_ptr, target_ptr, cols, inside, smoothing, spread, PROBS)
            sum_q += tl.sum(q, 0)
            sum_qz += tl.sum(tl.where(inside, q * (z_ends - pivot), 0.0), 0)
    return top, total, sum_q, sum_qz


@triton.jit
def row_target(target_ptr, weight_ptr, row, V, ignore_index):
    """A row's class, whether it counts, and w_y: 0 where it does not, NaN for no class at all."""
    y = tl.load(target_ptr + row)
    counts = y != ignore_index
    exists = (y >= 0) & (y < V)
    share = tl.where(exists, 1.0, float("nan"))
    y = tl.where(exists, y, 0)
    if weight_ptr is not None:
        share *= tl.load(weight_ptr + y).to(tl.float32)
    return y, counts, tl.where(counts, share, 0.0)


@triton.jit
def row_loss(m, d, mass, pull, z_y, pivot, share, keep, z_loss):
    """The loss of a row from its statistics."""
    log_d = tl.log(d)
    lse = m + log_d
    nll = log_d - (z_y - m)
    squared = tl.where(z_loss == 0.0, 0.0, z_loss * share * lse * lse)  # lse^2 may overflow
    return keep * share * nll + mass * (log_d + (m - pivot)) - pull + squared


@triton.jit
def _gradient(
    x_ptrs, weight_ptr, target_ptr, cols, mask, y, m, a, b, g, smoothing, spread, softcap,
    PROBS: tl.constexpr, HAS_MASS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Dx of some columns of a row."""
    z, slope = _logits(x_ptrs, mask, softcap, HAS_SOFTCAP, len(cols.shape) == 2)
    dz = a * exp(z - m) - tl.where(cols == y, b, 0.0)
    if HAS_MASS:
        dz -= g * _mass(weight_ptr, target_ptr, cols, mask, smoothing, spread, PROBS)
    if HAS_SOFTCAP:
        dz *= slope
    return dz


@triton.jit
def write_gradient(
    x_ptr, dx_ptr, weight_ptr, target_ptr,
    begin, dx_begin, lead, count, V, read, y, m, a, b, g, smoothing, spread, softcap,
    PROBS: tl.constexpr, HAS_MASS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """``dz = a exp(z - m) - b [c = y] - g q`` over a row; dx_ptr may be x_ptr.

    read: V; or 0, and then nothing is: with a, b and g of 0 the gradient is 0.
    """
    lanes = _lanes(BLOCK, LANE)
    x_ptrs = x_ptr + tl.multiple_of(begin + lead, LANE) + lanes
    dx_ptrs = dx_ptr + tl.multiple_of(dx_begin + lead, LANE) + lanes
    count_read = tl.multiple_of(tl.minimum(count, read), LANE)
    for start in range(0, count, BLOCK):
        mask = start + lanes < count_read
        dz = _gradient(
            x_ptrs + start, weight_ptr, target_ptr, lead + start + lanes, mask,
            y, m, a, b, g, smoothing, spread, softcap, PROBS, HAS_MASS, HAS_SOFTCAP,
        )  # fmt: skip
        tl.store(dx_ptrs + start, dz, mask=start + lanes < count)
    if not EVEN:
        cols, mask = _ends(lead, count, V, LANE)
        dz = _gradient(
            x_ptr + begin + cols, weight_ptr, target_ptr, cols, mask & (cols < read),
            y, m, a, b, g, smoothing, spread, softcap, PROBS, HAS_MASS, HAS_SOFTCAP,
        )  # fmt: skip
        tl.store(dx_ptr + dx_begin + cols, dz, mask=mask)


@triton.jit(do_not_specialize=["ignore_index"])
def _forward_kernel(
    x_ptr, target_ptr, weight_ptr, loss_ptr, share_ptr, stats_ptr, lse_ptr,
    stride_xm, stride_tm, M, V, ignore_index, smoothing, z_loss, softcap,
    PROBS: tl.constexpr, HAS_MASS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    read = V
    if PROBS:
        y, share, keep = 0, 1.0, 0.0
        target_ptr += row * stride_tm
    else:
        y, counts, share = row_target(target_ptr, weight_ptr, row, V, ignore_index)
        keep = 1.0 - smoothing
        read = tl.where(counts | (lse_ptr is not None), V, 0)
    begin, lead, count = aligned_part(row, stride_xm, read, EVEN, LANE)
    z_y = tl.load(x_ptr + begin + y).to(tl.float32)
    if HAS_SOFTCAP:
        z_y, _ = capped(z_y, softcap)
    pivot = tl.where(z_y == float("-inf"), 0.0, z_y)
    m, d, mass, pull = row_statistics(
        x_ptr, weight_ptr, target_ptr,
        begin, lead, count, read, pivot, smoothing, smoothing / V, softcap,
        PROBS, HAS_MASS, HAS_SOFTCAP, EVEN, BLOCK, LANE,
    )  # fmt: skip
    if PROBS:
        loss = row_loss(m, d, mass, pull, pivot, pivot, share, keep, z_loss)
    else:
        loss = row_loss(m, d, mass, pull, z_y, pivot, share, keep, z_loss)
        loss = tl.where(counts, loss, 0.0)
        m = tl.where(read == 0, 0.0, m)  # not of nothing: the backward multiplies it by 0
        d = tl.where(read == 0, 1.0, d)
    tl.store(loss_ptr + row, loss)
    if share_ptr is not None:
        tl.store(share_ptr + row, share)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, m + tl.log(d))
    tl.store(stats_ptr + row, m)
    tl.store(stats_ptr + M + row, d)
    if HAS_MASS:
        tl.store(stats_ptr + 2 * M + row, mass)


@triton.jit
def _reduce_kernel(loss_ptr, share_ptr, out_ptr, total_ptr, M, BLOCK: tl.constexpr):
    """Sums the rows' losses in a fixed order; divides by the sum of their shares, where given."""
    offs = tl.arange(0, BLOCK)
    loss = tl.zeros([BLOCK], tl.float32)
    share = tl.zeros([BLOCK], tl.float32)
    for start in range(0, M, BLOCK):
        mask = start + offs < M
        loss += tl.load(loss_ptr + start + offs, mask=mask, other=0.0)
        if share_ptr is not None:
            share += tl.load(share_ptr + start + offs, mask=mask, other=0.0)
    out = tl.sum(loss, 0)
    if share_ptr is not None:
        total = tl.sum(share, 0)
        tl.store(total_ptr, total)
        out /= total
    tl.store(out_ptr, out)


@triton.jit(do_not_specialize=["ignore_index"])
def _backward_kernel(
    dloss_ptr, dlse_ptr, total_ptr, x_ptr, target_ptr, weight_ptr, stats_ptr, dx_ptr,
    stride_dloss, stride_dlse, stride_xm, stride_tm, stride_dxm, M, V,
    ignore_index, smoothing, z_loss, softcap,
    PROBS: tl.constexpr, HAS_MASS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """One program a row; dx may be x."""
    row = tl.program_id(0).to(tl.int64)
    begin, lead, count = aligned_part(row, stride_xm, V, EVEN, LANE)
    if PROBS:
        y, counts, share, keep = -1, row >= 0, 1.0, 0.0
        target_ptr += row * stride_tm
    else:
        y, counts, share = row_target(target_ptr, weight_ptr, row, V, ignore_index)
        keep = 1.0 - smoothing
    m = tl.load(stats_ptr + row)
    d = tl.load(stats_ptr + M + row)
    g = tl.load(dloss_ptr + row * stride_dloss).to(tl.float32)
    if total_ptr is not None:
        g /= tl.load(total_ptr)
    a = keep * share + 2.0 * z_loss * share * (m + tl.log(d))
    if HAS_MASS:
        a += tl.load(stats_ptr + 2 * M + row)
    g = tl.where(counts, g, 0.0)  # where no row does, 0 / 0
    a = tl.where(counts, a * g, 0.0)
    read = tl.where(counts | (dlse_ptr is not None), V, 0)
    if dlse_ptr is not None:  # an ignored row has no loss, and an lse all the same
        a += tl.load(dlse_ptr + row * stride_dlse).to(tl.float32)
    write_gradient(
        x_ptr, dx_ptr, weight_ptr, target_ptr,
        begin, row * stride_dxm, lead, count, V, read, y, m, a / d, g * keep * share, g,
        smoothing, smoothing / V, softcap,
        PROBS, HAS_MASS, HAS_SOFTCAP, EVEN, BLOCK, LANE,
    )  # fmt: skip


# --- launch -------------------------------------------------------------------------------------


def lane_of(x: Tensor) -> int:
    """Elements in 16 bytes."""
    return 16 // x.element_size()


@tunable("BLOCK", "num_warps")
def row_options(x: Tensor) -> dict[str, int | bool]:
    """How a program takes a row of ``x`` (M, V): two lanes a thread at a time; unmeasured."""
    V, lane = x.shape[1], lane_of(x)
    warps = 1 if V <= 1024 else 4 if V <= 8192 else 8
    even = V % lane == 0 and (x.stride(0) % lane == 0 or x.shape[0] == 1)
    return {"EVEN": even, "BLOCK": 64 * warps * lane, "LANE": lane, "num_warps": warps}


def _forward_fake(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    z_loss: float,
    softcap: float,
    dtype: torch.dtype,
    wants_lse: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M = input.shape[0]
    has_mass = smoothing > 0.0 or target.dim() == 2

    def empty(*shape):
        return input.new_empty(shape, dtype=torch.float32)

    loss = input.new_empty((M,) if reduction == "none" else (), dtype=dtype)
    return (
        loss,
        empty(M if wants_lse else 0),
        empty(3 if has_mass else 2, M),
        empty(*(() if reduction == "mean" else (0,))),
    )


def _backward_fake(
    dloss: Tensor,
    dlse: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    total: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """Rows as far from 16-byte boundaries as those of ``input``, so that lanes match."""
    M, V = input.shape
    lane = lane_of(input)
    room = (input.stride(0) - V) % lane if input.stride(1) == 1 else 0
    return input.new_empty(M, V + room)[:, :V]


def _launch_backward(
    dx: Tensor,
    dloss: Tensor,
    dlse: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    total: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    M, V = input.shape
    x = rows_of(input, V)
    probs = target.dim() == 2
    target = rows_of(target, V) if probs else target.contiguous()
    weight = None if weight is None else weight.contiguous()
    _backward_kernel[(M,)](
        dloss, dlse, total if total.dim() == 0 else None, x, target, weight, stats, dx,
        dloss.stride(0) if dloss.dim() else 0, dlse.stride(0) if dlse is not None else 0,
        x.stride(0), target.stride(0), dx.stride(0), M, V,
        ignore_index, smoothing, z_loss, softcap,
        PROBS=probs, HAS_MASS=probs or smoothing > 0.0, HAS_SOFTCAP=softcap > 0.0,
        **row_options(x),
    )  # fmt: skip


@torch_op("cross_entropy_backward", fake=_backward_fake)
def _backward(
    dloss: Tensor,
    dlse: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    total: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    options = (ignore_index, smoothing, z_loss, softcap)
    dx = _backward_fake(dloss, dlse, input, target, weight, stats, total, *options)
    _launch_backward(dx, dloss, dlse, input, target, weight, stats, total, *options)
    return dx


def _nothing(*args: object) -> None:
    return None


@torch_op("cross_entropy_backward_", fake=_nothing, mutates=("input",))
def _backward_inplace(
    dloss: Tensor,
    dlse: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    total: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    options = (ignore_index, smoothing, z_loss, softcap)
    _launch_backward(input, dloss, dlse, input, target, weight, stats, total, *options)


def _save(ctx, inputs, output):
    input, target, weight, *ctx.options, ctx.inplace = inputs
    ctx.lse_shape = output[1].shape
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, target, weight, *output[2:])


def _rows_reference(input, target, weight, ignore_index, reduction, smoothing, z_loss, softcap):
    return reference(
        input,
        target,
        weight,
        None,
        ignore_index,
        None,
        reduction,
        smoothing,
        z_loss=z_loss,
        softcap=softcap,
        return_lse=True,
    )


def _gradients(ctx, dloss, dlse, _dstats, _dtotal):
    input, target, weight, stats, total = ctx.saved_tensors
    ignore_index, reduction, smoothing, z_loss, softcap, dtype, wants_lse = ctx.options
    if not wants_lse:
        dlse = None
    nothing = (None,) * 10
    if dloss is None and dlse is None:
        return None, *nothing
    if torch.is_grad_enabled():  # create_graph=True
        inputs = (input, target, weight, ignore_index, reduction, smoothing, z_loss, softcap)
        with torch.autocast(input.device.type, enabled=dtype != input.dtype, dtype=torch.bfloat16):
            return eager_gradients(_rows_reference, inputs, (dloss, dlse))[0], *nothing
    if dloss is None:
        dloss = torch.zeros((), dtype=dtype, device=input.device)
    options = (ignore_index, smoothing, z_loss, softcap)
    if not ctx.inplace:
        dx = _backward(dloss, dlse, input, target, weight, stats, total, *options)
        return dx, *nothing
    _backward_inplace(dloss, dlse, input, target, weight, stats, total, *options)
    torch.autograd.graph.increment_version(input)  # a second backward must not read gradients
    return input.detach(), *nothing


@torch_op("cross_entropy", fake=_forward_fake, setup_context=_save, backward=_gradients)
def _forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    z_loss: float,
    softcap: float,
    dtype: torch.dtype,
    wants_lse: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, lse, stats, total = _forward_fake(
        input, target, weight, ignore_index, reduction, smoothing, z_loss, softcap, dtype,
        wants_lse, inplace,
    )  # fmt: skip
    M, V = input.shape
    x = rows_of(input, V)
    probs, mean = target.dim() == 2, reduction == "mean"
    target = rows_of(target, V) if probs else target.contiguous()
    weight = None if weight is None else weight.contiguous()
    losses = loss if reduction == "none" else stats.new_empty(M)
    shares = stats.new_empty(M) if mean else None
    _forward_kernel[(M,)](
        x, target, weight, losses, shares, stats, lse if wants_lse else None,
        x.stride(0), target.stride(0), M, V, ignore_index, smoothing, z_loss, softcap,
        PROBS=probs, HAS_MASS=probs or smoothing > 0.0, HAS_SOFTCAP=softcap > 0.0,
        **row_options(x),
    )  # fmt: skip
    if reduction != "none":
        _reduce_kernel[(1,)](
            losses, shares, loss, total if mean else None, M, BLOCK=4096, num_warps=8
        )
    return loss, lse, stats, total


# --- public -------------------------------------------------------------------------------------


def uncovered_classes(
    dtype: torch.dtype, classes: int, target: Tensor, weight: Tensor | None, smoothing: float
) -> str | None:
    """Why a kernel leaves such targets, class weights or smoothing to PyTorch, or None."""
    if weight is not None:
        if tuple(weight.shape) != (classes,) or weight.device != target.device:
            return f"weight has shape {tuple(weight.shape)}, on {weight.device}"
        if weight.requires_grad:
            return "weight requires a gradient"
        if weight.dtype != dtype and not (
            torch.is_autocast_enabled(target.device.type) and weight.dtype in OP.dtypes
        ):
            return f"weight is {weight.dtype} and input {dtype}"
    if not 0.0 <= smoothing <= 1.0:
        return f"label_smoothing is {smoothing}"
    return None


def _uncovered(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    inplace_backward: bool = False,
    return_lse: bool = False,
) -> str | None:
    if input.dtype not in OP.dtypes:
        return f"input is {input.dtype}"
    if input.dim() == 0 or input.numel() == 0:
        return "input is a number, or empty"
    if target.device != input.device:
        return f"target is on {target.device} and input on {input.device}"
    dim = min(1, input.dim() - 1)
    if target.shape == input.shape:
        if target.dtype not in OP.dtypes:
            return f"target holds probabilities in {target.dtype}"
        if target.requires_grad:
            return "target requires a gradient"
    elif target.dtype != torch.int64 or target.shape != input.shape[:dim] + input.shape[dim + 1 :]:
        return f"target is {target.dtype} of shape {tuple(target.shape)}"
    if reduction not in ("none", "mean", "sum"):
        return f"reduction is {reduction!r}"
    return uncovered_classes(input.dtype, input.shape[dim], target, weight, label_smoothing)


@dispatched(eager=reference, uncovered=_uncovered)
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    inplace_backward: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of logits and targets; drop-in for ``F.cross_entropy``.

    Args:
        input: Logits (V), (N, V) or (N, V, d1, ...), float32, float16 or bfloat16; any strides, but
            what is not (N, V) with a last stride of 1 is copied first.
        target: Class numbers, int64, the shape of ``input`` without V; or probabilities, the shape
            of ``input``.
        weight: (V), a factor of each class.
        size_average: Deprecated, as ``reduce``: see ``reduction``.
        ignore_index: Class number of rows that do not count.
        reduce: Deprecated.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: Share of the target spread over all classes, in [0, 1].
        z_loss: Adds ``z_loss * w_y * lse**2`` to the loss of a row (PaLM; w_y is 1 for
            probabilities), where lse is the log-sum-exp.
        softcap: Positive: the logits become ``softcap * tanh(input / softcap)`` (Gemma 2).
        inplace_backward: Let the backward write the gradient over ``input``, which must be no leaf
            and not be read by anything after; the kernel does, PyTorch's op and compiled code
            ignore it. A second backward then raises. Else ``input`` is never written.
        return_lse: Give ``(loss, lse)``: log-sum-exp of the capped logits, float32, the shape of
            class numbers, differentiable, of ignored rows too.

    Returns:
        The loss, the dtype of ``input``; float32 under autocast, as PyTorch. The arithmetic is
        float32. All targets ignored: NaN for ``"mean"``, 0 for ``"sum"``, as PyTorch, and a
        gradient of 0. A class number outside [0, V) gives a loss and a gradient of NaN for its row
        and reads nothing outside; PyTorch stops the GPU there, and raises on the CPU.

    Raises:
        ValueError: ``z_loss`` or ``softcap`` is negative; ``inplace_backward`` on a leaf.
    """
    check_extensions("cross_entropy", z_loss, softcap)
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    inplace = inplace_backward and input.requires_grad and not torch.compiler.is_compiling()
    if inplace and input.is_leaf:
        raise ValueError(
            "cross_entropy: inplace_backward must not be used on a leaf; got an input that is one"
        )
    V = input.shape[min(1, input.dim() - 1)]
    shape = target.shape
    if target.shape == input.shape:
        shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else target.shape[1:]
        target = _as_rows(target, V)
    else:
        target = target.reshape(-1)
    loss, lse, _, _ = _forward(
        _as_rows(input, V), target, weight, ignore_index, reduction, label_smoothing, z_loss,
        softcap, result_dtype(input), return_lse, inplace,
    )  # fmt: skip
    if reduction == "none":
        loss = loss.reshape(shape)
    return (loss, lse.reshape(shape)) if return_lse else loss


def _as_rows(x: Tensor, V: int) -> Tensor:
    """(V), (N, V) or (N, V, d1, ...) as (M, V)."""
    if x.dim() == 2:
        return x
    return x.movedim(1, -1).reshape(-1, V) if x.dim() > 2 else x[None]


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` over the fused ``cross_entropy``, with z-loss and softcap."""

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float = 0.0,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        check_extensions("CrossEntropyLoss", z_loss, softcap)
        self.z_loss, self.softcap = z_loss, softcap

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits against targets."""
        loss = cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
        )
        assert isinstance(loss, Tensor)
        return loss


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype,
    device: torch.device,
    M: int,
    V: int,
    weighted: bool = False,
    probabilities: bool = False,
    **options: object,
) -> Inputs:
    x = (3 * torch.randn(M, V, dtype=dtype, device=device)).requires_grad_()
    if probabilities:
        target = torch.rand(M, V, dtype=dtype, device=device)
    else:
        target = torch.randint(0, V, (M,), device=device)
        target[M // 2 : M // 2 + M // 4] = -100
    inputs: Inputs = {"input": x, "target": target, **options}
    if weighted:
        inputs["weight"] = torch.rand(V, dtype=dtype, device=device) + 0.5
    return inputs


OP = Op(
    fused=cross_entropy,
    reference=reference,
    example=_example,
    sizes=(
        {"M": 1, "V": 1},
        {"M": 4, "V": 1003, "weighted": True, "label_smoothing": 0.1},
        {"M": 2, "V": 2600, "softcap": 2.0, "z_loss": 1e-2, "return_lse": True},
        {"M": 2, "V": 523, "probabilities": True, "weighted": True, "reduction": "none"},
        {"M": 2, "V": 520, "reduction": "sum"},
    ),
    bench_sizes=(
        {"M": 8192, "V": 32000},
        {"M": 8192, "V": 50257},
        {"M": 8192, "V": 50304},
        {"M": 8192, "V": 50257, "label_smoothing": 0.1},
        {"M": 8192, "V": 50304, "softcap": 30.0, "z_loss": 1e-4},
        {"M": 4096, "V": 128256},
    ),
    work=lambda input, **_: (input.nbytes, 6 * input.numel()),
)
