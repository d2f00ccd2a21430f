r"""The gradient of an additive bias: ds summed over the dimensions along which the bias repeats.

A program owns a tile of the bias and visits, in order, every batch, head, row tile and column tile
that reads it; sums stay in its registers, so no buffer grows with the repeats and two runs agree to
the bit. It recomputes ds, which costs three matrix products that only a bias with a gradient pays.
"""

import triton
import triton.language as tl

from ._scores import SPARSE, head_of, seen_keys
from ._tiles import dot, load_tile
from .backward import dropped, load_stats, weights


@triton.jit(do_not_specialize=["left", "right"])
def dbias_kernel(  # noqa: PLR0915
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, minus_delta_ptr, gain_ptr, dbias_ptr, score, blocks,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_dob, stride_dom, stride_doh,
    B, H, S_q, S_k, left, right, scale, bias_b, bias_h, bias_m, bias_n,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE_ROW: tl.constexpr, ONE_COL: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the contiguous (bias_b, bias_h, bias_m, bias_n) gradient."""
    tiles_m = tl.cdiv(bias_m, BLOCK_M)
    tiles_n = tl.cdiv(bias_n, BLOCK_N)
    pid = tl.program_id(0)
    pid_n = pid % tiles_n
    pid_m = pid // tiles_n % tiles_m
    own_h = pid // tiles_n // tiles_m % bias_h
    own_b = pid // tiles_n // tiles_m // bias_h
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_d = (offs_d < HEAD_DIM)[None, :]
    mask_dv = (offs_dv < HEAD_DIM_V)[None, :]
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    repeats_b = B // bias_b
    repeats_h = H // bias_h
    repeats_m = tl.cdiv(S_q, BLOCK_M) if ONE_ROW else 1
    repeats_n = tl.cdiv(S_k, BLOCK_N) if ONE_COL else 1
    for step in range(repeats_b * repeats_h * repeats_m * repeats_n):
        tile_n = pid_n + step % repeats_n
        rest = step // repeats_n
        tile_m = pid_m + rest % repeats_m
        rest = rest // repeats_m
        h = tl.cast(own_h + rest % repeats_h, tl.int64)
        b = tl.cast(own_b + rest // repeats_h, tl.int64)
        h_kv = h // GROUP

        offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = offs_m.to(tl.int64)[:, None]
        cols = offs_n.to(tl.int64)[:, None]
        mask_m = offs_m < S_q
        mask_n = (offs_n < S_k)[:, None]
        q_ptrs = q_ptr + b * stride_qb + h * stride_qh + rows * stride_qm + offs_d[None, :]
        do_ptrs = do_ptr + b * stride_dob + h * stride_doh + rows * stride_dom + offs_dv[None, :]
        k_ptrs = k_ptr + b * stride_kb + h_kv * stride_kh + cols * stride_kn + offs_d[None, :]
        v_ptrs = v_ptr + b * stride_vb + h_kv * stride_vh + cols * stride_vn + offs_dv[None, :]
        q = load_tile(q_ptrs, mask_m[:, None], mask_d, True, HEAD_DIM != BLOCK_D)
        do = load_tile(do_ptrs, mask_m[:, None], mask_dv, True, HEAD_DIM_V != BLOCK_DV)
        k = load_tile(k_ptrs, mask_n, mask_d, True, HEAD_DIM != BLOCK_D)
        v = load_tile(v_ptrs, mask_n, mask_dv, True, HEAD_DIM_V != BLOCK_DV)
        stats = (b * H + h) * S_q + offs_m
        lse, minus_delta = load_stats(lse_ptr + stats, minus_delta_ptr + stats, mask_m, True)
        slope, bias_ptr, seed = head_of(b, h, H, score)
        p, _ = weights(
            dot(q, k.T), lse[:, None], offs_m[:, None], offs_n[None, :], slope, bias_ptr,
            S_q, S_k, scale, score,
        )  # fmt: skip
        p = tl.where(seen_keys(offs_m[:, None], offs_n[None, :], left, right, S_k), p, 0.0)
        if gain_ptr is not None:
            p *= tl.load(gain_ptr + stats, mask=mask_m, other=1.0)[:, None]
        if blocks is not None:
            row = tile_m * BLOCK_M // SPARSE
            at = (b * blocks.stride_b + h * blocks.stride_h + row) * blocks.columns
            shown = tl.load(blocks.counts_ptr + at + tile_n * BLOCK_N // SPARSE)
            p = tl.where(shown != 0, p, 0.0)
        dp = dropped(dot(do, v.T), offs_m[:, None], offs_n[None, :], b * H + h, seed, score)
        dbias += p * (dp + minus_delta[:, None])

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if ONE_ROW:
        dbias = tl.sum(dbias, 0, keep_dims=True) + tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if ONE_COL:
        dbias = tl.sum(dbias, 1, keep_dims=True) + tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    row = (tl.cast(own_b, tl.int64) * bias_h + own_h) * bias_m + offs_m
    mask = (offs_m < bias_m)[:, None] & (offs_n < bias_n)[None, :]
    dbias_ptrs = dbias_ptr + row[:, None] * bias_n + offs_n[None, :]
    tl.store(dbias_ptrs, dbias.to(dbias_ptr.dtype.element_ty), mask=mask)
