"""Joins attention over parts of the keys: what ring attention and split caches are built on."""

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from attention over each.

    lse = log sum_t e^(lse_t) and o = sum_t e^(lse_t - lse) o_t. Plain PyTorch, differentiable in
    every argument; a part that saw no key (lse_t = -inf) weighs nothing.

    Args:
        outs: One (B, S_q, H, D) a part.
        lses: One (B, H, S_q) a part, natural log.

    Returns:
        o (B, S_q, H, D) in the dtype of the first part, and lse (B, H, S_q). A row that no part saw
        gives 0 and -inf.

    Raises:
        ValueError: No parts, as many lses as outs are not given, or shapes that differ.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(
            "merge_attention: outs and lses must be as many, 1 or more; "
            f"got {len(outs)} and {len(lses)}"
        )
    B, S_q, H, _ = outs[0].shape
    for n, (o, lse) in enumerate(zip(outs, lses, strict=True)):
        if o.shape != outs[0].shape or tuple(lse.shape) != (B, H, S_q):
            raise ValueError(
                f"merge_attention: part {n} must be {tuple(outs[0].shape)} with lse {(B, H, S_q)}; "
                f"got {tuple(o.shape)} and {tuple(lse.shape)}"
            )
    parts = torch.stack(list(lses))
    empty = (parts == float("-inf")).all(0)
    # a finite stand-in: the gradient of a row of -inf would be NaN
    parts = parts.masked_fill(empty, 0.0)
    lse = parts.logsumexp(0)
    weights = torch.exp(parts - lse).masked_fill(empty, 0.0).transpose(2, 3).unsqueeze(-1)
    wide = torch.promote_types(outs[0].dtype, torch.float32)
    o = sum(w * part.to(wide) for w, part in zip(weights, outs, strict=True))
    return o.to(outs[0].dtype), lse.masked_fill(empty, float("-inf"))
