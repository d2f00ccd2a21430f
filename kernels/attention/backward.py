r"""The backward kernels: nothing but q, k, v, o and lse is saved, and no sum is atomic.

With p = e^(scale q k^T - lse), recomputed a tile at a time:

    delta = sum_d do o - dlse        dv = p^T do        ds = p (do v^T - delta)
    dq = scale ds k                  dk = scale ds^T q

One kernel finds what belongs to a row, one dk and dv (a program owns a tile of keys and reads
every query that sees it, over all query heads of its KV head), one dq. Each sum has one owner and
one order, so two runs agree to the bit. The price is 7 matrix products where 5 would do.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import block_d_of, dot, key_range, load_tile, seen_keys, tile_of
from .forward import LOG2_E, band, rows_strided

# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _rows_kernel(
    o_ptr, do_ptr, lse_ptr, dlse_ptr, lse2_ptr, delta_ptr,
    stride_ob, stride_om, stride_oh, stride_dob, stride_dom, stride_doh,
    stride_lb, stride_lh, stride_lm, H, S_q,
    HAS_DLSE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What the other kernels read of BLOCK_M queries of one head: delta, and lse in base 2."""
    tiles = tl.cdiv(S_q, BLOCK_M)
    pid_bh = (tl.program_id(0) // tiles).to(tl.int64)
    b = pid_bh // H
    h = pid_bh % H
    offs_m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < S_q
    mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    rows = offs_m.to(tl.int64)
    o_ptrs = o_ptr + b * stride_ob + h * stride_oh + rows[:, None] * stride_om + offs_d[None, :]
    do_ptrs = (
        do_ptr + b * stride_dob + h * stride_doh + rows[:, None] * stride_dom + offs_d[None, :]
    )
    o = tl.load(o_ptrs, mask=mask, other=0.0).to(tl.float32)
    do = tl.load(do_ptrs, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(o * do, 1)
    if HAS_DLSE:
        dlse_ptrs = dlse_ptr + b * stride_lb + h * stride_lh + rows * stride_lm
        delta -= tl.load(dlse_ptrs, mask=mask_m, other=0.0)
    offsets = pid_bh * S_q + rows
    lse = tl.load(lse_ptr + offsets, mask=mask_m, other=0.0)
    # a row that saw no key: p = 2^(s - inf) = 0
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    tl.store(lse2_ptr + offsets, lse2, mask=mask_m)
    tl.store(delta_ptr + offsets, delta, mask=mask_m)


@triton.jit
def _load_stats(lse_ptrs, delta_ptrs, mask_m, MASKED: tl.constexpr):
    """The base-2 lse and delta of a tile of rows; past the last row +inf, so that p is 0."""
    if MASKED:
        lse = tl.load(lse_ptrs, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptrs, mask=mask_m, other=0.0)
    else:
        lse = tl.load(lse_ptrs)
        delta = tl.load(delta_ptrs)
    return lse, delta


@triton.jit
def _gather_dkdv(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, start, stop,
    stride_qm, stride_dom, S_q, S_k, offs_n, left, right, qk_scale,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds to dk and dv of a tile of keys what queries start..stop of one head send."""
    offs_0 = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    q_offs = offs_0[:, None] * stride_qm + offs_d[None, :]
    do_offs = offs_0[:, None] * stride_dom + offs_d[None, :]
    mask_d = (offs_d < HEAD_DIM)[None, :]
    for m in tl.range(start, stop, BLOCK_M):
        m = tl.multiple_of(m, BLOCK_M)
        row = tl.cast(m, tl.int64)
        offs_m = m + offs_0
        mask_m = offs_m < S_q
        q_ptrs = q_ptr + row * stride_qm + q_offs
        q = load_tile(q_ptrs, mask_m[:, None], mask_d, MASKED, HEAD_DIM != BLOCK_D)
        do_ptrs = do_ptr + row * stride_dom + do_offs
        do = load_tile(do_ptrs, mask_m[:, None], mask_d, MASKED, HEAD_DIM != BLOCK_D)
        lse, delta = _load_stats(lse_ptr + offs_m, delta_ptr + offs_m, mask_m, MASKED)
        pT = tl.math.exp2(dot(k, q.T) * qk_scale - lse[None, :])
        if MASKED and (HAS_LEFT or HAS_RIGHT):
            # keys past S_k need no mask: their rows of dk and dv are not stored
            seen = seen_keys(
                offs_m[None, :], offs_n[:, None], left, right, S_k, HAS_LEFT, HAS_RIGHT
            )
            pT = tl.where(seen, pT, 0.0)
        dv = dot(pT.to(do.dtype), do, dv)
        dsT = pT * (dot(v, do.T) - delta[None, :])
        dk = dot(dsT.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["left", "right"])
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_dob, stride_dom, stride_doh,
    H_kv, S_q, S_k, left, right, scale,
    GROUP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one KV head, over all its query heads."""
    tiles = tl.cdiv(S_k, BLOCK_N)
    pid_n = tl.program_id(0) % tiles  # with a right edge the first keys have the most queries
    pid_bh = (tl.program_id(0) // tiles).to(tl.int64)
    b = pid_bh // H_kv
    h_kv = pid_bh % H_kv
    first = pid_n * BLOCK_N
    last = tl.minimum(first + BLOCK_N, S_k) - 1
    offs_n = first + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    cols = offs_n.to(tl.int64)[:, None]
    mask_n = (offs_n < S_k)[:, None]
    mask_d = (offs_d < HEAD_DIM)[None, :]
    k_ptrs = k_ptr + b * stride_kb + h_kv * stride_kh + cols * stride_kn + offs_d[None, :]
    v_ptrs = v_ptr + b * stride_vb + h_kv * stride_vh + cols * stride_vn + offs_d[None, :]
    k = load_tile(k_ptrs, mask_n, mask_d, True, HEAD_DIM != BLOCK_D)
    v = load_tile(v_ptrs, mask_n, mask_d, True, HEAD_DIM != BLOCK_D)

    # Query i sees key j where j - right <= i <= j - left.
    begin = 0
    full_begin = 0
    if HAS_RIGHT:
        begin = tl.maximum(first - right, 0) // BLOCK_M * BLOCK_M
        full_begin = tl.cdiv(tl.maximum(last - right, 0), BLOCK_M) * BLOCK_M
    end = S_q
    full_end = S_q // BLOCK_M * BLOCK_M
    if HAS_LEFT:
        end = tl.minimum(S_q, tl.maximum(last - left + 1, 0))
        full_end = tl.minimum(S_q, tl.maximum(first - left + 1, 0)) // BLOCK_M * BLOCK_M

    qk_scale = scale * LOG2_E
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for g in range(GROUP):
        h = h_kv * GROUP + g
        q_head = q_ptr + b * stride_qb + h * stride_qh
        do_head = do_ptr + b * stride_dob + h * stride_doh
        lse_head = lse_ptr + (pid_bh * GROUP + g) * S_q
        delta_head = delta_ptr + (pid_bh * GROUP + g) * S_q
        if HAS_RIGHT:
            dk, dv = _gather_dkdv(
                dk, dv, k, v, q_head, do_head, lse_head, delta_head,
                begin, tl.minimum(full_begin, end),
                stride_qm, stride_dom, S_q, S_k, offs_n, left, right, qk_scale,
                True, HAS_LEFT, HAS_RIGHT, HEAD_DIM, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        dk, dv = _gather_dkdv(
            dk, dv, k, v, q_head, do_head, lse_head, delta_head, full_begin, full_end,
            stride_qm, stride_dom, S_q, S_k, offs_n, left, right, qk_scale,
            False, HAS_LEFT, HAS_RIGHT, HEAD_DIM, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        dk, dv = _gather_dkdv(
            dk, dv, k, v, q_head, do_head, lse_head, delta_head,
            tl.maximum(full_begin, full_end), end,
            stride_qm, stride_dom, S_q, S_k, offs_n, left, right, qk_scale,
            True, HAS_LEFT, HAS_RIGHT, HEAD_DIM, BLOCK_M, BLOCK_D,
        )  # fmt: skip

    # dk and dv are contiguous (B, S_k, H_kv, D)
    offsets = ((b * S_k + cols) * H_kv + h_kv) * HEAD_DIM + offs_d[None, :]
    mask = mask_n & mask_d
    tl.store(dv_ptr + offsets, dv.to(dv_ptr.dtype.element_ty), mask=mask)
    tl.store(dk_ptr + offsets, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gather_dq(
    dq, q, do, lse, delta, k_ptr, v_ptr, start, stop,
    stride_kn, stride_vn, S_k, offs_m, left, right, qk_scale,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds to dq of a tile of queries what keys start..stop send."""
    offs_0 = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    k_offs = offs_0[:, None] * stride_kn + offs_d[None, :]
    v_offs = offs_0[:, None] * stride_vn + offs_d[None, :]
    mask_d = (offs_d < HEAD_DIM)[None, :]
    for n in tl.range(start, stop, BLOCK_N):
        n = tl.multiple_of(n, BLOCK_N)
        offs_n = n + offs_0
        mask_n = (offs_n < S_k)[:, None]
        k_ptrs = k_ptr + tl.cast(n, tl.int64) * stride_kn + k_offs
        v_ptrs = v_ptr + tl.cast(n, tl.int64) * stride_vn + v_offs
        k = load_tile(k_ptrs, mask_n, mask_d, MASKED, HEAD_DIM != BLOCK_D)
        v = load_tile(v_ptrs, mask_n, mask_d, MASKED, HEAD_DIM != BLOCK_D)
        p = tl.math.exp2(dot(q, k.T) * qk_scale - lse[:, None])
        if MASKED:
            seen = seen_keys(
                offs_m[:, None], offs_n[None, :], left, right, S_k, HAS_LEFT, HAS_RIGHT
            )
            p = tl.where(seen, p, 0.0)
        ds = p * (dot(do, v.T) - delta[:, None])
        dq = dot(ds.to(k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=["left", "right"])
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_dob, stride_dom, stride_doh,
    H, S_q, S_k, left, right, scale,
    GROUP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head."""
    tiles = tl.cdiv(S_q, BLOCK_M)
    pid_m = tl.program_id(0) % tiles
    pid_bh = (tl.program_id(0) // tiles).to(tl.int64)
    if HAS_RIGHT:
        pid_m = tiles - 1 - pid_m  # the longest rows first, so that the last programs are short
    b = pid_bh // H
    h = pid_bh % H
    h_kv = h // GROUP
    k_ptr += b * stride_kb + h_kv * stride_kh
    v_ptr += b * stride_vb + h_kv * stride_vh

    first = pid_m * BLOCK_M
    last = tl.minimum(first + BLOCK_M, S_q) - 1
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    rows = offs_m.to(tl.int64)
    mask_m = offs_m < S_q
    mask_d = (offs_d < HEAD_DIM)[None, :]
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + rows[:, None] * stride_qm + offs_d[None, :]
    do_ptrs = (
        do_ptr + b * stride_dob + h * stride_doh + rows[:, None] * stride_dom + offs_d[None, :]
    )
    q = load_tile(q_ptrs, mask_m[:, None], mask_d, True, HEAD_DIM != BLOCK_D)
    do = load_tile(do_ptrs, mask_m[:, None], mask_d, True, HEAD_DIM != BLOCK_D)
    stats = pid_bh * S_q + rows
    lse, delta = _load_stats(lse_ptr + stats, delta_ptr + stats, mask_m, True)

    qk_scale = scale * LOG2_E
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, full_begin, full_end, end = key_range(
        first, last, left, right, S_k, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    if HAS_LEFT:
        dq = _gather_dq(
            dq, q, do, lse, delta, k_ptr, v_ptr, begin, tl.minimum(full_begin, end),
            stride_kn, stride_vn, S_k, offs_m, left, right, qk_scale,
            True, HAS_LEFT, HAS_RIGHT, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    dq = _gather_dq(
        dq, q, do, lse, delta, k_ptr, v_ptr, full_begin, full_end,
        stride_kn, stride_vn, S_k, offs_m, left, right, qk_scale,
        False, HAS_LEFT, HAS_RIGHT, HEAD_DIM, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = _gather_dq(
        dq, q, do, lse, delta, k_ptr, v_ptr, tl.maximum(full_begin, full_end), end,
        stride_kn, stride_vn, S_k, offs_m, left, right, qk_scale,
        True, HAS_LEFT, HAS_RIGHT, HEAD_DIM, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    # dq is contiguous (B, S_q, H, D)
    offsets = ((b * S_q + rows) * H + h)[:, None] * HEAD_DIM + offs_d[None, :]
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + offsets, dq, mask=mask_m[:, None] & mask_d)


# --- launch -------------------------------------------------------------------------------------


def backward_fake(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    left: int | None,
    right: int | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty dq, dk, dv, contiguous; those that nobody wants have no elements."""
    wants_dq, wants_dkdv = wanted
    dq = q.new_empty(q.shape) if wants_dq else q.new_empty(0)
    dk, dv = (x.new_empty(x.shape) if wants_dkdv else x.new_empty(0) for x in (k, v))
    return dq, dk, dv


def backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    left: int | None,
    right: int | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv from the gradients of o and lse; ``wanted`` says whether dq, and dk with dv."""
    dq, dk, dv = backward_fake(do, dlse, q, k, v, o, lse, scale, left, right, wanted)
    wants_dq, wants_dkdv = wanted
    B, S_q, H, D = q.shape
    S_k, H_kv = k.shape[1], k.shape[2]
    if lse.numel() == 0 or S_k == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, o, do = (rows_strided(x) for x in (q, k, v, o, do))
    left, right = band(left, right, S_q, S_k)
    block_d = block_d_of(D)
    flags = {
        "GROUP": H // H_kv,
        "HAS_LEFT": left is not None,
        "HAS_RIGHT": right is not None,
        "HEAD_DIM": D,
        "BLOCK_D": block_d,
    }
    lse = lse.contiguous()
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    block_m = min(64, max(16, 8192 // block_d))
    _rows_kernel[(triton.cdiv(S_q, block_m) * B * H,)](
        o, do, lse, dlse, lse2, delta,
        *o.stride()[:3], *do.stride()[:3], *(dlse.stride() if dlse is not None else (0, 0, 0)),
        H, S_q,
        HAS_DLSE=dlse is not None, HEAD_DIM=D, BLOCK_D=block_d, BLOCK_M=block_m, num_warps=4,
    )  # fmt: skip
    if wants_dkdv:
        tile = tile_of("dkdv", q, block_d)
        _dkdv_kernel[(triton.cdiv(S_k, tile.n) * B * H_kv,)](
            q, k, v, do, lse2, delta, dk, dv,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
            H_kv, S_q, S_k, left or 0, right or 0, scale,
            **flags, **tile.options(),
        )  # fmt: skip
    if wants_dq:
        tile = tile_of("dq", q, block_d)
        _dq_kernel[(triton.cdiv(S_q, tile.m) * B * H,)](
            q, k, v, do, lse2, delta, dq,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
            H, S_q, S_k, left or 0, right or 0, scale,
            **flags, **tile.options(),
        )  # fmt: skip
    return dq, dk, dv
