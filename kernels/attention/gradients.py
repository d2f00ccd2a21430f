"""The backward launch: dq, dk, dv and the gradients of sinks and bias from those of o and lse."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ._scores import Blocks, blocks_of, score_of, tiles_of
from ._tiles import block_d_of, starts_full, tile_of
from .backward import dkdv_kernel, dq_kernel, rows_kernel
from .bias import dbias_kernel
from .forward import band, rows_aligned, sequences


def backward_fake(
    do: Tensor,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    peaks: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float,
    dropout_p: float,
    wanted: Sequence[bool],
    block_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty dq, dk, dv, dsinks, dbias, contiguous; those that nobody wants have no elements."""
    dq, dk, dv, dsinks, dbias = (
        x.new_empty(x.shape) if x is not None and w else q.new_empty(0)
        for x, w in zip((q, k, v, sinks, bias), wanted, strict=True)
    )
    return dq, dk, dv, dsinks, dbias


def _sinks_gradient(
    dsinks: Tensor, sinks: Tensor, lse: Tensor, sums: Tensor, dlse: Tensor | None
) -> None:
    share = torch.exp(sinks.float()[:, None] - lse)  # of a sink in its row's softmax
    delta = sums if dlse is None else sums - dlse
    dsinks.copy_(-(share * delta).sum((0, 2)))


def _block_flags(mask: Tensor | None) -> Blocks | None:
    """A block mask as such, one number a block: what the gradient of a bias reads."""
    if mask is None:
        return None
    lists = blocks_of(mask)
    return lists and lists._replace(counts_ptr=mask.to(torch.int32).contiguous())


def _scratch(grad: Tensor, x: Tensor, wanted: bool) -> Tensor:
    """Where a kernel that makes two gradients puts the one that nobody wants."""
    return grad if wanted else torch.empty_like(x, memory_format=torch.contiguous_format)


def backward(  # noqa: C901
    do: Tensor,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    peaks: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float,
    dropout_p: float,
    wanted: Sequence[bool],
    block_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gives dq, dk, dv, dsinks, dbias; ``wanted`` says which. dk and dv come together."""
    grads = backward_fake(
        do, dlse, o, lse, peaks, q, k, v, sinks, bias, slopes, seed, cu_seqlens_q, cu_seqlens_k,
        scale, left, right, softcap, dropout_p, wanted,
    )  # fmt: skip
    B, S_q, H, D = q.shape
    S_k, H_kv, D_v = v.shape[1:]
    nothing = lse.numel() == 0 or sequences(q, cu_seqlens_q) == 0
    if nothing or S_k == 0 or cu_seqlens_q is not None:  # rows of no sequence have no program
        for g in grads:
            g.zero_()
    if nothing:
        return grads
    dq, dk, dv, dsinks, dbias = grads
    q, k, v, o, do = (rows_aligned(x) for x in (q, k, v, o, do))
    lse = lse.contiguous()
    minus_delta = torch.empty_like(lse)
    lse2, gain = peaks if peaks.numel() else (torch.empty_like(lse), None)
    block_d, block_dv = block_d_of(D), block_d_of(D_v)
    block_m = min(64, max(16, 8192 // block_dv))
    rows_kernel[(triton.cdiv(S_q, block_m) * B * H,)](
        o, do, lse, dlse, lse2 if gain is None else None, minus_delta,
        *o.stride()[:3], *do.stride()[:3], *(dlse.stride() if dlse is not None else (None,) * 3),
        H, S_q,
        HEAD_DIM_V=D_v, BLOCK_DV=block_dv, BLOCK_M=block_m, num_warps=4,
    )  # fmt: skip
    sums = None
    if sinks is not None and wanted[3]:
        sums = torch.zeros_like(lse)
    if S_k == 0:
        if sinks is not None and sums is not None:
            _sinks_gradient(dsinks, sinks, lse, sums, dlse)
        return grads

    left, right = band(left, right, S_q, S_k, cu_seqlens_q)
    score = score_of(softcap, slopes, bias, dropout_p, seed)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    width, crowded = max(block_d, block_dv), bias is not None or dropout_p > 0
    dims = {
        "GROUP": H // H_kv,
        "HEAD_DIM": D,
        "HEAD_DIM_V": D_v,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
    }
    # Dropout falls between product and sum. Beside the counters of grouped heads dkdv spills with
    # it (sm_90, 128 dimensions), and not without.
    delta_first = dropout_p == 0.0 and starts_full(q)
    grouped = H_kv < H
    B = sequences(q, cu_seqlens_q)
    if wanted[1] or wanted[2]:
        dk, dv = _scratch(dk, k, wanted[1]), _scratch(dv, v, wanted[2])
        tile = tile_of("dkdv", q, width, busy=cu_seqlens_q is not None, crowded=crowded)
        dkdv_kernel[(tiles_of(S_k, B, tile.n, cu_seqlens_k) * H_kv,)](
            q, k, v, do, lse2, minus_delta, gain, dk, dv,
            cu_seqlens_q, cu_seqlens_k, score, blocks_of(block_mask, by_key=True),
            *strides, B, H_kv, S_q, S_k, left, right, scale,
            **dims, **tile.options(), DELTA_FIRST=delta_first and not grouped,
        )  # fmt: skip
    if wanted[0] or sums is not None:
        dq = _scratch(dq, q, wanted[0])
        tile = tile_of("dq", q, width, crowded=crowded)
        dq_kernel[(tiles_of(S_q, B, tile.m, cu_seqlens_q) * H,)](
            q, k, v, do, lse2, minus_delta, gain, dq, sums,
            cu_seqlens_q, cu_seqlens_k, score, blocks_of(block_mask),
            *strides, B, H, S_q, S_k, left, right, scale,
            **dims, **tile.options(), DELTA_FIRST=delta_first,
        )  # fmt: skip
    if sinks is not None and sums is not None:
        _sinks_gradient(dsinks, sinks, lse, sums, dlse)
    if bias is not None and wanted[4] and bias.numel():
        tile = tile_of("dq", q, width, crowded=crowded)
        tile = tile._replace(n=min(tile.n, 32))  # a third tile: the sums
        bias_b, bias_h, bias_m, bias_n = bias.shape
        tiles = triton.cdiv(bias_m, tile.m) * triton.cdiv(bias_n, tile.n)
        dbias_kernel[(tiles * bias_b * bias_h,)](
            q, k, v, do, lse2, minus_delta, gain, dbias, score, _block_flags(block_mask),
            *strides, B, H, S_q, S_k, left, right, scale, *bias.shape,
            **dims, **tile.options(), ONE_ROW=bias_m == 1, ONE_COL=bias_n == 1,
        )  # fmt: skip
    return grads
