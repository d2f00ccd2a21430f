"""The loss in PyTorch's ops: the reference, the steps of a part of the logits, sums over rows."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
from torch import Tensor

from ..cross_entropy import reference as cross_entropy_reference


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


# --- rows ---------------------------------------------------------------------------------------
# Vectors of N: too little to launch kernels of our own for. In float32, or float64 for float64.


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of this dtype are in: float32, or float64."""
    return torch.promote_types(dtype, torch.float32)


def targets_of(
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


def losses_of(m, d, z_y, pull, share, counts, mass, spread, smoothing, z_loss):
    """Each row's loss."""
    log_d = d.log()
    lse = m + log_d
    loss = (1.0 - smoothing) * share * (log_d - (z_y - m))
    if pull is not None:
        loss = loss + mass * lse - spread * pull
    if z_loss:
        loss = loss + z_loss * share * lse * lse
    return torch.where(counts, loss, 0.0)


def coefficients_of(g, m, d, share, counts, mass, spread, smoothing, z_loss):
    """a, b and c of ``ds = a exp(z - m) - b [c = y] - c w`` for each row, from its gradient."""
    a = (1.0 - smoothing) * share + mass
    if z_loss:
        a = a + 2.0 * z_loss * share * (m + d.log())
    a = torch.where(counts, g * a / d, 0.0)
    b = torch.where(counts, g * (1.0 - smoothing) * share, 0.0)
    return a, b, torch.where(counts, g * spread, 0.0) if smoothing else None


def masses_of(
    weight: Tensor | None, smoothing: float, classes: int, group: Any = None
) -> tuple[float, Any]:
    """The q of a class without its weight, s / V, and the sum of q over classes of all ranks."""
    spread = smoothing / classes
    if weight is None or not smoothing:
        return spread, smoothing
    total = weight.sum(dtype=wide_dtype(weight.dtype))
    if group is not None:
        dist.all_reduce(total, group=group)
    return spread, spread * total


# --- parts of the logits ------------------------------------------------------------------------


def logits_of(
    x: Tensor, matrix: Tensor, bias: Tensor | None, softcap: float, room: Tensor | None = None
) -> Tensor:
    """Logits of some rows, rounded as PyTorch's are, capped; in ``room`` where it is given."""
    if room is None:
        z = F.linear(x, matrix, bias)
    elif bias is None:
        z = torch.mm(x, matrix.T, out=room)
    else:
        z = torch.addmm(bias, x, matrix.T, out=room)
    z = z.to(wide_dtype(z.dtype))
    return z.div_(softcap).tanh_().mul_(softcap) if softcap else z


def slope_of(z: Tensor, softcap: float) -> Tensor | None:
    """The derivative of capped logits."""
    return 1.0 - (z / softcap).square_() if softcap else None


def into_statistics_(
    z: Tensor, y: Tensor, weight: Tensor | None, wants_pull: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of each row of logits: m, d, the target's logit (0 if it is not here), and sum(w z).

    Leaves e^(z - m) in ``z``, or zeros in a row of -inf.
    """
    m = z.amax(1)
    z_y = torch.where(y < 0, 0.0, z.gather(1, y.clamp(min=0)[:, None])[:, 0])
    pull = None
    if wants_pull:
        pull = z.sum(1) if weight is None else z @ weight.to(z.dtype)
    shift = torch.where(m == float("-inf"), 0.0, m)
    return m, z.sub_(shift[:, None]).exp_().sum(1), z_y, pull


def into_gradient_(
    e: Tensor,
    y: Tensor,
    weight: Tensor | None,
    slope: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
) -> Tensor:
    """Turns e^(z - m) into ds, in place."""
    ds = e.mul_(a[:, None])
    ds.scatter_add_(1, y.clamp(min=0)[:, None], torch.where(y < 0, 0.0, -b)[:, None])
    if c is not None:
        ds.sub_(c[:, None] if weight is None else c[:, None] * weight.to(ds.dtype))
    return ds if slope is None else ds.mul_(slope)


# Logits that are held at once, in bytes; on GPUs unmeasured. Fewer rows read and write dW more
# often: with 1024 rows of H = 4096 that is a modelled third of the time of the products on sm_90.
# On two cores of a Zen 3, 768 rows of H = 128, V = 50304: 303 ms in 64 MiB, 381 in 8, 463 in 256.
CHUNK_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}


def chunks_of(x: Tensor, V: int, rows: int | None) -> list[slice]:
    """``rows`` at a time, or about equal shares within the budget of memory."""
    N = x.shape[0]
    if rows is None:
        rows = max(CHUNK_BYTES.get(x.device.type, CHUNK_BYTES["cuda"]) // (V * x.itemsize), 1)
        if rows >= 128:  # whole tiles of a product
            number = triton.cdiv(N, rows // 128 * 128)
            rows = triton.cdiv(N, 128 * number) * 128
    return [slice(start, min(start + rows, N)) for start in range(0, N, rows)]


def check_targets(target: Tensor, ignore_index: int, V: int) -> None:
    """On the CPU, where PyTorch raises, so does this."""
    if target.device.type == "cpu":
        missing = target[(target != ignore_index) & ((target < 0) | (target >= V))]
        if missing.numel():
            raise IndexError(f"Target {int(missing[0])} is out of bounds.")


def empty_gradients(
    input: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    wanted: Sequence[bool],
    dtypes: Sequence[Any],
) -> Any:
    """Room for the gradients of the three that are wanted; nothing for the others."""
    return tuple(
        t.new_empty(t.shape, dtype=dtype) if t is not None and w else input.new_empty(0)
        for t, w, dtype in zip((input, matrix, bias), wanted, dtypes, strict=True)
    )
