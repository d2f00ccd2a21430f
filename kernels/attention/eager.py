"""Attention in plain PyTorch, scores and all: what the kernels must equal."""

import torch
from torch import Tensor

from ._scores import dropout_mask


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
    batch: int = 0,
) -> tuple[Tensor, Tensor]:
    """Gives o (B, S_q, H, D_v) and lse (B, H, S_q) with the steps and roundings of textbook code.

    A row that sees no key gives o = 0 where textbook code gives NaN. ``batch`` is the place of the
    first sequence in a ragged batch, which keys its dropout.
    """
    B, S_q, H, _ = q.shape
    S_k = k.shape[1]
    group = H // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if group != 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if slopes is not None:
        rows = torch.arange(S_q, device=q.device)[:, None] + (S_k - S_q)
        distance = (rows - torch.arange(S_k, device=q.device)).abs()
        scores = scores - (slopes[:, :, None, None] * distance).to(scores.dtype)
    seen = visible(S_q, S_k, left, right, q.device).expand_as(scores)
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
        column = sinks.to(scores.dtype)[:, None, None].expand(B, H, S_q, 1)
        p = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        lse = torch.logaddexp(lse, sinks.to(wide.dtype)[:, None])
    p = p.masked_fill(~seen, 0.0)
    if dropout_p > 0.0 and seed is not None:
        keep = dropout_mask(seed, dropout_p, batch + B, H, S_q, S_k, device=q.device)[batch:]
        p = torch.where(keep, p / (1 - dropout_p), 0.0)
    return (p @ v).transpose(1, 2), lse
