r"""The backward kernels: nothing but q, k, v, o and lse is saved, and no sum is atomic.

With p = e^(s - lse), recomputed a tile at a time, and t = scale q k^T before softcap:

    delta = sum_d do o - dlse        dv = p^T do        ds = p (do v^T - delta) ds/dt
    dq = scale ds k                  dk = scale ds^T q        dsink = -sum_i e^(sink - lse) delta

The products do v^T start from -delta where that costs nothing (``DELTA_FIRST``): it spares the sums
after them, and the registers of the deltas.

Where the forward kept peaks, p = 2^(s - m) gain with gain = 1 / l: no rounding of lse enters.

For dsink delta is sum_j p (do v^T) - dlse, which owes nothing to o's rounding. Dropout's mask and
factor lie on p where it makes dv, and on do v^T.

One kernel finds what belongs to a row, one dk and dv (a program owns a tile of keys and reads
every query that sees it, over all query heads of its KV head), one dq. Each sum has one owner and
one order, so two runs agree to the bit. The price is 7 matrix products where 5 would do.
"""

import triton
import triton.language as tl

from .._maths import LOG2_E
from ._scores import (
    SPARSE,
    head_of,
    is_shaped,
    kept,
    key_range,
    listed,
    locate,
    query_range,
    seen_keys,
    seen_queries,
    shape_scores,
    visited,
)
from ._tiles import dot, load_tile


@triton.jit
def rows_kernel(
    o_ptr, do_ptr, lse_ptr, dlse_ptr, lse2_ptr, minus_delta_ptr,
    stride_ob, stride_om, stride_oh, stride_dob, stride_dom, stride_doh,
    stride_lb, stride_lh, stride_lm, H, S_q,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What the other kernels read of BLOCK_M queries of one head: -delta, and lse in base 2."""
    tiles = tl.cdiv(S_q, BLOCK_M)
    pid_bh = (tl.program_id(0) // tiles).to(tl.int64)
    b = pid_bh // H
    h = pid_bh % H
    offs_m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_DV)
    mask_m = offs_m < S_q
    mask = mask_m[:, None] & (offs_d < HEAD_DIM_V)[None, :]
    rows = offs_m.to(tl.int64)
    o_ptrs = o_ptr + b * stride_ob + h * stride_oh + rows[:, None] * stride_om + offs_d[None, :]
    do_head = do_ptr + b * stride_dob + h * stride_doh
    o = tl.load(o_ptrs, mask=mask, other=0.0).to(tl.float32)
    do = tl.load(do_head + rows[:, None] * stride_dom + offs_d[None, :], mask=mask, other=0.0)
    minus_delta = -tl.sum(o * do.to(tl.float32), 1)
    if dlse_ptr is not None:
        dlse_ptrs = dlse_ptr + b * stride_lb + h * stride_lh + rows * stride_lm
        minus_delta += tl.load(dlse_ptrs, mask=mask_m, other=0.0)
    offsets = pid_bh * S_q + rows
    if lse2_ptr is not None:
        lse = tl.load(lse_ptr + offsets, mask=mask_m, other=0.0)
        # a row that saw no key: p = 2^(s - inf) = 0
        lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
        tl.store(lse2_ptr + offsets, lse2, mask=mask_m)
    tl.store(minus_delta_ptr + offsets, minus_delta, mask=mask_m)


@triton.jit
def load_stats(lse_ptrs, minus_delta_ptrs, mask_m, MASKED: tl.constexpr):
    """The base-2 lse and -delta of a tile of rows; past the last row +inf, so that p is 0."""
    if MASKED:
        lse = tl.load(lse_ptrs, mask=mask_m, other=float("inf"))
        minus_delta = tl.load(minus_delta_ptrs, mask=mask_m, other=0.0)
    else:
        lse = tl.load(lse_ptrs)
        minus_delta = tl.load(minus_delta_ptrs)
    return lse, minus_delta


@triton.jit
def weights(qk, lse, rows, cols, slope, bias_ptr, S_q, S_k, scale, score):
    """The weights p of a tile before its mask, and ds/dt."""
    s, slack = shape_scores(qk, rows, cols, slope, bias_ptr, S_q, S_k, scale, score)
    factor = 1.0 if is_shaped(score) else scale * LOG2_E
    return tl.math.exp2(s * factor - lse), slack


@triton.jit
def dropped(x, rows, cols, head, seed, score):
    """A tile of p or do v^T as dropout leaves it."""
    if score.dropout_p is not None:
        keep = kept(rows, cols, head, seed, score)
        x = tl.where(keep, x * (1.0 / (1.0 - score.dropout_p)), 0.0)
    return x


@triton.jit
def _gather_dkdv(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, minus_delta_ptr, gain_ptr, start, stop, b, h, H, total_q,
    stride_qm, stride_qh, stride_dom, stride_doh, S_q, S_k, offs_n, left, right, scale, score,
    blocks, list_ptr, MASKED: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    DELTA_FIRST: tl.constexpr,
):  # fmt: skip
    """Adds to dk and dv of a tile of keys what queries start..stop of heads h..h+HEADS send.

    One loop over all heads: nested in another, ptxas (CUDA 12.8) spills up to 340 times.
    """
    span = stop - start
    if HEADS > 1:
        span = tl.maximum(tl.cdiv(span, BLOCK_M), 1) * BLOCK_M
        stop = tl.where(stop > start, start + HEADS * span, start)
    offs_0 = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    q_offs = offs_0[:, None] * stride_qm + offs_d[None, :]
    do_offs = offs_0[:, None] * stride_dom + offs_dv[None, :]
    mask_d = (offs_d < HEAD_DIM)[None, :]
    mask_dv = (offs_dv < HEAD_DIM_V)[None, :]
    for t in tl.range(start, stop, BLOCK_M):
        g = 0
        if HEADS > 1:
            g = (t - start) // span
            t -= tl.cast(tl.cast(g, tl.int64) * span, tl.int32)  # a remainder takes registers
        m = tl.multiple_of(listed(t, blocks, list_ptr), BLOCK_M)
        row = tl.cast(m, tl.int64)
        offs_m = m + offs_0
        mask_m = offs_m < S_q
        q_ptrs = q_ptr + ((h + g) * stride_qh + row * stride_qm) + q_offs
        q = load_tile(q_ptrs, mask_m[:, None], mask_d, MASKED, HEAD_DIM != BLOCK_D)
        do_ptrs = do_ptr + ((h + g) * stride_doh + row * stride_dom) + do_offs
        do = load_tile(do_ptrs, mask_m[:, None], mask_dv, MASKED, HEAD_DIM_V != BLOCK_DV)
        at = (h + g) * total_q  # added alone: a sum with offs_m takes 15 instructions more (sm_90)
        lse, minus_delta = load_stats(
            lse_ptr + at + offs_m, minus_delta_ptr + at + offs_m, mask_m, MASKED
        )
        slope, bias_ptr, seed = head_of(b, h + g, H, score)
        head = b * H + h + g
        rows = offs_m[None, :]
        cols = offs_n[:, None]
        pT, slack = weights(
            dot(k, q.T), lse[None, :], rows, cols, slope, bias_ptr, S_q, S_k, scale, score
        )
        # keys past S_k alone need no mask: their rows of dk and dv are not stored
        if MASKED and ((left is not None) or (right is not None)):
            pT = tl.where(seen_queries(rows, cols, left, right, S_k), pT, 0.0)
        if gain_ptr is not None:
            pT *= tl.load(gain_ptr + at + offs_m, mask=mask_m, other=1.0)[None, :]
        dv = dot(dropped(pT, rows, cols, head, seed, score).to(do.dtype), do, dv)
        if DELTA_FIRST:
            dsT = pT * dot(v, do.T, tl.broadcast_to(minus_delta[None, :], pT.shape))
        else:  # the sum alone Triton would fold into the product
            dpT = dropped(dot(v, do.T), rows, cols, head, seed, score)
            dsT = tl.fma(pT, dpT, pT * minus_delta[None, :])
        dsT *= slack
        dk = dot(dsT.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["left", "right"])
def dkdv_kernel(  # noqa: PLR0915
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, minus_delta_ptr, gain_ptr, dk_ptr, dv_ptr,
    cu_seqlens_q, cu_seqlens_k, score, blocks,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_dob, stride_dom, stride_doh,
    B, H_kv, S_q, S_k, left, right, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DELTA_FIRST: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one KV head, over all its query heads."""
    total_q = S_q
    # with a right edge the first keys have the most queries, and they come first
    b, h_kv, pid_n, start_k, S_k = locate(tl.program_id(0), S_k, H_kv, B, cu_seqlens_k, BLOCK_N)
    first = pid_n * BLOCK_N
    last = tl.minimum(first + BLOCK_N, S_k) - 1
    offs_n = first + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    cols = offs_n.to(tl.int64)[:, None]
    if cu_seqlens_k is not None:
        if first >= S_k:
            return
        start_q = tl.load(cu_seqlens_q + b).to(tl.int64)
        S_q = tl.load(cu_seqlens_q + b + 1).to(tl.int32) - start_q.to(tl.int32)
        k_ptr += tl.cast(start_k, tl.int64) * stride_kn
        v_ptr += tl.cast(start_k, tl.int64) * stride_vn
        q_ptr += start_q * stride_qm
        do_ptr += start_q * stride_dom
        stats = start_q
        if left is not None:
            left += S_k - S_q
        if right is not None:
            right += S_k - S_q
        out_rows = start_k + cols
    else:
        k_ptr += b * stride_kb
        v_ptr += b * stride_vb
        q_ptr += b * stride_qb
        do_ptr += b * stride_dob
        stats = b * H_kv * GROUP * S_q
        out_rows = b * S_k + cols
    mask_n = (offs_n < S_k)[:, None]
    mask_d = (offs_d < HEAD_DIM)[None, :]
    mask_dv = (offs_dv < HEAD_DIM_V)[None, :]
    k_ptrs = k_ptr + h_kv * stride_kh + cols * stride_kn + offs_d[None, :]
    v_ptrs = v_ptr + h_kv * stride_vh + cols * stride_vn + offs_dv[None, :]
    k = load_tile(k_ptrs, mask_n, mask_d, True, HEAD_DIM != BLOCK_D)
    v = load_tile(v_ptrs, mask_n, mask_dv, True, HEAD_DIM_V != BLOCK_DV)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    begin, full_begin, full_end, end = query_range(first, last, left, right, S_q, BLOCK_M)
    h = h_kv * GROUP
    lse_ptr += stats
    minus_delta_ptr += stats
    if gain_ptr is not None:
        gain_ptr += stats
    if blocks is not None:
        for g in range(GROUP):
            count, list_ptr = visited(blocks, b, h + g, first // SPARSE)
            dk, dv = _gather_dkdv(
                dk, dv, k, v, q_ptr, do_ptr, lse_ptr, minus_delta_ptr, gain_ptr, 0, count * SPARSE,
                b, h + g, H_kv * GROUP, total_q,
                stride_qm, stride_qh, stride_dom, stride_doh, S_q, S_k, offs_n, left, right, scale,
                score, blocks, list_ptr,
                True, 1, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, DELTA_FIRST,
            )  # fmt: skip
    else:
        if right is not None:
            dk, dv = _gather_dkdv(
                dk, dv, k, v, q_ptr, do_ptr, lse_ptr, minus_delta_ptr, gain_ptr,
                begin, tl.minimum(full_begin, end), b, h, H_kv * GROUP, total_q,
                stride_qm, stride_qh, stride_dom, stride_doh, S_q, S_k, offs_n, left, right, scale,
                score, None, 0,
                True, GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, DELTA_FIRST,
            )  # fmt: skip
        dk, dv = _gather_dkdv(
            dk, dv, k, v, q_ptr, do_ptr, lse_ptr, minus_delta_ptr, gain_ptr,
            full_begin, full_end, b, h, H_kv * GROUP, total_q,
            stride_qm, stride_qh, stride_dom, stride_doh, S_q, S_k, offs_n, left, right, scale,
            score, None, 0,
            False, GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, DELTA_FIRST,
        )  # fmt: skip
        dk, dv = _gather_dkdv(
            dk, dv, k, v, q_ptr, do_ptr, lse_ptr, minus_delta_ptr, gain_ptr,
            tl.maximum(full_begin, full_end), end, b, h, H_kv * GROUP, total_q,
            stride_qm, stride_qh, stride_dom, stride_doh, S_q, S_k, offs_n, left, right, scale,
            score, None, 0,
            True, GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, DELTA_FIRST,
        )  # fmt: skip

    # dk and dv are contiguous
    dk_ptrs = dk_ptr + (out_rows * H_kv + h_kv) * HEAD_DIM + offs_d[None, :]
    dv_ptrs = dv_ptr + (out_rows * H_kv + h_kv) * HEAD_DIM_V + offs_dv[None, :]
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=mask_n & mask_dv)
    tl.store(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask_n & mask_d)


@triton.jit
def _gather_dq(
    dq, sums, q, do, lse, minus_delta, k_ptr, v_ptr, start, stop,
    stride_kn, stride_vn, S_q, S_k, offs_m, left, right, scale, score, slope, bias_ptr, head, seed,
    blocks, list_ptr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, SUMS: tl.constexpr,
    DELTA_FIRST: tl.constexpr,
):  # fmt: skip
    """Adds to dq of a tile of queries what keys start..stop send, and to sums p do v^T."""
    offs_0 = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    k_offs = offs_0[:, None] * stride_kn + offs_d[None, :]
    v_offs = offs_0[:, None] * stride_vn + offs_dv[None, :]
    mask_d = (offs_d < HEAD_DIM)[None, :]
    mask_dv = (offs_dv < HEAD_DIM_V)[None, :]
    for t in tl.range(start, stop, BLOCK_N):
        n = tl.multiple_of(listed(t, blocks, list_ptr), BLOCK_N)
        offs_n = n + offs_0
        mask_n = (offs_n < S_k)[:, None]
        k_ptrs = k_ptr + tl.cast(n, tl.int64) * stride_kn + k_offs
        v_ptrs = v_ptr + tl.cast(n, tl.int64) * stride_vn + v_offs
        k = load_tile(k_ptrs, mask_n, mask_d, MASKED, HEAD_DIM != BLOCK_D)
        v = load_tile(v_ptrs, mask_n, mask_dv, MASKED, HEAD_DIM_V != BLOCK_DV)
        rows = offs_m[:, None]
        cols = offs_n[None, :]
        p, slack = weights(
            dot(q, k.T), lse[:, None], rows, cols, slope, bias_ptr, S_q, S_k, scale, score
        )
        if MASKED:
            p = tl.where(seen_keys(rows, cols, left, right, S_k), p, 0.0)
        if DELTA_FIRST and not SUMS:
            ds = p * dot(do, v.T, tl.broadcast_to(minus_delta[:, None], p.shape))
        else:
            dp = dropped(dot(do, v.T), rows, cols, head, seed, score)
            if SUMS:
                sums += tl.sum(p * dp, 1)
            ds = p * (dp - (-minus_delta)[:, None])  # the negation leaves the loop
        ds *= slack
        dq = dot(ds.to(k.dtype), k, dq)
    return dq, sums


@triton.jit(do_not_specialize=["left", "right"])
def dq_kernel(  # noqa: PLR0915
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, minus_delta_ptr, gain_ptr, dq_ptr, sums_ptr,
    cu_seqlens_q, cu_seqlens_k, score, blocks,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_dob, stride_dom, stride_doh,
    B, H, S_q, S_k, left, right, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DELTA_FIRST: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head."""
    pid = tl.program_id(0)
    if right is not None:
        pid = tl.num_programs(0) - 1 - pid  # the longest rows first: the last programs are short
    total_q = S_q
    b, h, pid_m, start_q, S_q = locate(pid, S_q, H, B, cu_seqlens_q, BLOCK_M)
    first = pid_m * BLOCK_M
    last = tl.minimum(first + BLOCK_M, S_q) - 1
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = offs_m.to(tl.int64)
    if cu_seqlens_q is not None:
        if first >= S_q:
            return
        start_k = tl.load(cu_seqlens_k + b).to(tl.int64)
        S_k = tl.load(cu_seqlens_k + b + 1).to(tl.int32) - start_k.to(tl.int32)
        q_ptr += tl.cast(start_q, tl.int64) * stride_qm
        do_ptr += tl.cast(start_q, tl.int64) * stride_dom
        k_ptr += start_k * stride_kn
        v_ptr += start_k * stride_vn
        stats = h * total_q + start_q + rows
        out_rows = start_q + rows
        if left is not None:
            left += S_k - S_q
        if right is not None:
            right += S_k - S_q
    else:
        q_ptr += b * stride_qb
        do_ptr += b * stride_dob
        k_ptr += b * stride_kb
        v_ptr += b * stride_vb
        stats = (b * H + h) * S_q + rows
        out_rows = b * S_q + rows
    h_kv = h // GROUP
    k_ptr += h_kv * stride_kh
    v_ptr += h_kv * stride_vh
    mask_m = offs_m < S_q
    mask_d = (offs_d < HEAD_DIM)[None, :]
    mask_dv = (offs_dv < HEAD_DIM_V)[None, :]
    q_ptrs = q_ptr + h * stride_qh + rows[:, None] * stride_qm + offs_d[None, :]
    do_ptrs = do_ptr + h * stride_doh + rows[:, None] * stride_dom + offs_dv[None, :]
    q = load_tile(q_ptrs, mask_m[:, None], mask_d, True, HEAD_DIM != BLOCK_D)
    do = load_tile(do_ptrs, mask_m[:, None], mask_dv, True, HEAD_DIM_V != BLOCK_DV)
    lse, minus_delta = load_stats(lse_ptr + stats, minus_delta_ptr + stats, mask_m, True)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    slope, bias_ptr, seed = head_of(b, h, H, score)
    head = b * H + h
    begin, full_begin, full_end, end = key_range(first, last, left, right, S_k, BLOCK_N)
    if blocks is not None:
        count, list_ptr = visited(blocks, b, h, first // SPARSE)
        dq, sums = _gather_dq(
            dq, sums, q, do, lse, minus_delta, k_ptr, v_ptr, 0, count * SPARSE,
            stride_kn, stride_vn, S_q, S_k, offs_m, left, right, scale,
            score, slope, bias_ptr, head, seed, blocks, list_ptr,
            True, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, sums_ptr is not None,
            DELTA_FIRST,
        )  # fmt: skip
    else:
        if left is not None:
            dq, sums = _gather_dq(
                dq, sums, q, do, lse, minus_delta, k_ptr, v_ptr, begin, tl.minimum(full_begin, end),
                stride_kn, stride_vn, S_q, S_k, offs_m, left, right, scale,
                score, slope, bias_ptr, head, seed, None, 0,
                True, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, sums_ptr is not None,
                DELTA_FIRST,
            )  # fmt: skip
        dq, sums = _gather_dq(
            dq, sums, q, do, lse, minus_delta, k_ptr, v_ptr, full_begin, full_end,
            stride_kn, stride_vn, S_q, S_k, offs_m, left, right, scale,
            score, slope, bias_ptr, head, seed, None, 0,
            False, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, sums_ptr is not None,
            DELTA_FIRST,
        )  # fmt: skip
        dq, sums = _gather_dq(
            dq, sums, q, do, lse, minus_delta, k_ptr, v_ptr, tl.maximum(full_begin, full_end), end,
            stride_kn, stride_vn, S_q, S_k, offs_m, left, right, scale,
            score, slope, bias_ptr, head, seed, None, 0,
            True, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, sums_ptr is not None,
            DELTA_FIRST,
        )  # fmt: skip

    if gain_ptr is not None:
        gain = tl.load(gain_ptr + stats, mask=mask_m, other=1.0)
        dq *= gain[:, None]
        sums *= gain
    if sums_ptr is not None:
        tl.store(sums_ptr + stats, sums, mask=mask_m)
    # dq is contiguous
    dq_ptrs = dq_ptr + ((out_rows * H + h) * HEAD_DIM)[:, None] + offs_d[None, :]
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_d)
