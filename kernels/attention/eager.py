"""Attention in plain PyTorch, scores and all: what the kernels must equal."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .._register import torch_op
from ._scores import SPARSE_BLOCK, dropout_mask


def visible(
    S_q: int, S_k: int, left: int | None, right: int | None, device: torch.device
) -> Tensor:
    """Whether query i sees key j, (S_q, S_k): left <= j - i <= right."""
    diagonal = torch.arange(S_k, device=device) - torch.arange(S_q, device=device)[:, None]
    seen = torch.ones_like(diagonal, dtype=torch.bool)
    if left is not None:
        seen = seen & (diagonal >= left)
    if right is not None:
        seen = seen & (diagonal <= right)
    return seen


def attend_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float,
    dropout_p: float,
    block_mask: Tensor | None = None,
    batch: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention of q (B, S_q, H, D): o (B, S_q, H, D_v) and lse (B, H, S_q).

    ``batch`` is the place of the first sequence in a ragged batch, which keys its dropout.
    """
    B, S_q, H, _ = q.shape
    S_k = k.shape[1]
    i = torch.arange(S_q, device=q.device)[:, None]
    j = torch.arange(S_k, device=q.device)
    ramp = None
    if slopes is not None:
        ramp = slopes[:, :, None, None] * -(i + (S_k - S_q) - j).abs()
    keep = None
    if seed is not None:
        head = torch.arange(batch * H, (batch + B) * H, device=q.device).view(B, H, 1, 1)
        keep = dropout_mask(seed, dropout_p, head, i, j)
    seen = visible(S_q, S_k, left, right, q.device)
    if block_mask is not None:
        spread = block_mask.repeat_interleave(SPARSE_BLOCK, 2).repeat_interleave(SPARSE_BLOCK, 3)
        seen = seen & spread[:, :, :S_q, :S_k]
    return weigh(q, k, v, sinks, bias, ramp, keep, seen, scale, softcap, dropout_p)


def weigh(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    ramp: Tensor | None,
    keep: Tensor | None,
    seen: Tensor,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The same over ready masks, with the steps and roundings of textbook code.

    ``ramp`` is ALiBi's term, ``keep`` dropout's mask, ``seen`` the band's. A row that sees no key
    gives o = 0 where textbook code gives NaN.
    """
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if group != 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if ramp is not None:
        scores = scores + ramp.to(scores.dtype)
    seen = seen.expand_as(scores)
    if bias is not None and bias.dtype == torch.bool:
        seen = seen & bias
    elif bias is not None:
        seen = seen & (bias != float("-inf"))
        scores = scores + bias.to(scores.dtype)
    empty = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen, float("-inf")).masked_fill(empty, 0.0)
    wide = scores.float() if scores.dtype.itemsize == 2 else scores
    lse = wide.logsumexp(-1).masked_fill(empty[..., 0], float("-inf"))
    if sinks is None:
        p = scores.softmax(-1)
    else:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        p = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        lse = torch.logaddexp(lse, sinks.to(wide.dtype)[:, None])
    p = p.masked_fill(~seen, 0.0)
    if keep is not None:
        p = torch.where(keep, p / (1 - dropout_p), 0.0)
    return (p @ v).transpose(1, 2), lse


def attend_ragged_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The sequences of (1, T, H, D) tensors in turn, neighbours of one length together.

    Rows past the last sequence give 0 and -inf.
    """
    outs, lses, b = [], [], 0
    H, lse_dtype = q.shape[2], torch.promote_types(q.dtype, torch.float32)
    lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True)
    runs = list(_runs(lengths, H))
    # split, not slices: each slice's gradient would be as long as the batch
    *many_q, unused = _cut(q, [n * S_q for n, S_q, _ in runs])
    many_k, many_v = (_cut(t, [n * S_k for n, _, S_k in runs]) for t in (k, v))
    for (n, S_q, S_k), *parts in zip(runs, many_q, many_k, many_v, strict=False):
        q_run, k_run, v_run = (
            t.reshape(n, S, *t.shape[2:]) for t, S in zip(parts, (S_q, S_k, S_k), strict=True)
        )
        own = slopes[b : b + n] if slopes is not None and slopes.shape[0] > 1 else slopes
        o, lse = attend_eager(
            q_run, k_run, v_run, sinks, None, own, seed, scale,
            None if left is None else left + S_k - S_q,
            None if right is None else right + S_k - S_q,
            softcap, dropout_p, None, b,
        )  # fmt: skip
        outs.append(o.flatten(0, 1)[None])
        lses.append(lse.transpose(0, 1).flatten(1)[None])
        b += n
    outs.append(q.new_zeros(1, unused.shape[1], H, v.shape[3]))
    lses.append(q.new_full((1, H, unused.shape[1]), float("-inf"), dtype=lse_dtype))
    return torch.cat(outs, 1), torch.cat(lses, 2)


_TOGETHER = 2**22  # scores, at most, of sequences that are computed at once


def _runs(lengths: Iterable[tuple[int, int]], H: int) -> Iterator[tuple[int, int, int]]:
    """How many neighbours have one length, and that length of queries and keys."""
    for (S_q, S_k), run in itertools.groupby(lengths):
        left = len(list(run))
        most = max(1, _TOGETHER // max(1, H * S_q * S_k))
        while left:
            n = min(left, most)
            yield n, S_q, S_k
            left -= n


def _cut(x: Tensor, rows: list[int]) -> tuple[Tensor, ...]:
    """(1, T, ...) cut into so many rows each, and what is left."""
    return x.split_with_sizes([*rows, x.shape[1] - sum(rows)], 1)


def _ragged_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    o = q.new_empty(*q.shape[:3], v.shape[3])
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return o, q.new_empty(1, q.shape[2], q.shape[1], dtype=lse_dtype)


def _ragged_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]


def _ragged_gradients(ctx, do, dlse):
    wanted = [ctx.needs_input_grad[n] for n in range(4)]
    grads = _ragged_backward(do, dlse, *ctx.saved_tensors, *ctx.options, wanted)
    return *(g if w else None for g, w in zip(grads, wanted, strict=True)), *(None,) * 10


def _ragged_backward_fake(do, dlse, q, k, v, sinks, *rest):
    return [torch.empty_like(t if t is not None else q) for t in (q, k, v, sinks)]


@torch_op("flash_attention_ragged_eager_backward", fake=_ragged_backward_fake)
def _ragged_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float,
    dropout_p: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    q, k, v = (t.detach().requires_grad_(w) for t, w in zip((q, k, v), wanted[:3], strict=True))
    sinks = None if sinks is None else sinks.detach().requires_grad_(wanted[3])
    given = (q, k, v, sinks)
    with torch.enable_grad():
        outs = attend_ragged_eager(
            q, k, v, sinks, bias, slopes, seed, cu_seqlens_q, cu_seqlens_k,
            scale, left, right, softcap, dropout_p,
        )  # fmt: skip
    leaves = [t for t in given if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(outs, leaves, (do, dlse)))
    return [
        next(found).contiguous() if w else torch.empty_like(t if t is not None else q)
        for t, w in zip(given, wanted, strict=True)
    ]


# torch.compile sees the loop over lengths as one operator: only the tensor knows how many turns.
attend_ragged_opaque = torch_op(
    "flash_attention_ragged_eager",
    fake=_ragged_fake,
    setup_context=_ragged_save,
    backward=_ragged_gradients,
)(attend_ragged_eager)
