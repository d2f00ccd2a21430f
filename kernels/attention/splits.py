r"""Attention of a few new tokens over a long cache, contiguous or paged; forward only.

A program takes one KV head of one sequence and a share of its keys. The query heads of the group
and the new tokens are the rows of one tile, so each key is read once for all of them. With more
than one share a second kernel merges them:

    m = max_t lse_t        lse = m + log sum_t e^(lse_t - m)        o = sum_t e^(lse_t - lse) o_t

Cost: bound by the cache's bytes, 2 S_k H_kv D a sequence, read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import multiprocessors
from .._maths import LOG2_E
from .._register import torch_op
from ._scores import LN_2, is_shaped, score_of, shape_scores
from ._tiles import block_d_of, dot, load_tile
from .forward import rows_strided

# --- kernels ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["left", "right"])
def _decode_kernel(  # noqa: C901, PLR0915
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, seqlens_ptr, table_ptr, sinks_ptr, scales_ptr, score,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_tb,
    B, H, S_q, capacity, pages, left, right, scale, splits,
    GROUP: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows (new token, head of the group) over one share of the keys."""
    tiles = tl.cdiv(S_q * GROUP, BLOCK_M)
    H_kv = H // GROUP
    pid = tl.program_id(0)
    split = pid % splits
    tile = pid // splits % tiles
    h_kv = (pid // splits // tiles % H_kv).to(tl.int64)
    b = (pid // splits // tiles // H_kv).to(tl.int64)
    length = tl.minimum(tl.maximum(tl.load(seqlens_ptr + b).to(tl.int32), 0), capacity)

    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_m = packed // GROUP
    heads = h_kv * GROUP + packed % GROUP
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_m = offs_m < S_q
    mask_d = offs_d < HEAD_DIM
    mask_dv = (offs_dv < HEAD_DIM_V)[None, :]
    q_rows = b * stride_qb + offs_m.to(tl.int64) * stride_qm + heads * stride_qh
    q_ptrs = q_ptr + q_rows[:, None] + offs_d[None, :]
    q = load_tile(q_ptrs, mask_m[:, None], mask_d[None, :], True, HEAD_DIM != BLOCK_D)
    slope = 0.0
    if score.slopes_ptr is not None:
        slopes = score.slopes_ptr + b * score.stride_slopes + heads
        slope = (tl.load(slopes, mask=mask_m, other=0.0) * LOG2_E)[:, None]
    value_scale = 1.0
    if scales_ptr is not None:
        scale *= tl.load(scales_ptr + h_kv)
        value_scale = tl.load(scales_ptr + H_kv + h_kv)

    shift = length - S_q  # query i stands at key i + shift
    begin = 0
    end = length
    if left is not None:
        begin = tl.maximum(tile * BLOCK_M // GROUP + shift + left, 0) // BLOCK_N * BLOCK_N
    if right is not None:
        last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, S_q - 1)
        end = tl.minimum(end, tl.maximum(last + shift + right + 1, 0))
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), splits) * BLOCK_N
    start = begin + split * share
    end = tl.minimum(end, start + share)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    factor = 1.0 if is_shaped(score) else scale * LOG2_E
    for n in tl.range(start, end, BLOCK_N):
        cols = n + offs_n
        readable = cols < length
        page = b
        rows_n = cols.to(tl.int64)
        if table_ptr is not None:
            if PAGE % BLOCK_N == 0:  # the tile lies in one page, which all threads look up at once
                page = tl.load(table_ptr + b * stride_tb + n // PAGE).to(tl.int64)
                rows_n = n % PAGE + offs_n.to(tl.int64)
            else:
                slots = table_ptr + b * stride_tb + cols // PAGE
                page = tl.load(slots, mask=readable, other=-1).to(tl.int64)
                rows_n = (cols % PAGE).to(tl.int64)
            readable = readable & (page >= 0) & (page < pages)
        k_rows = page * stride_kb + rows_n * stride_kn
        v_rows = page * stride_vb + rows_n * stride_vn
        k_ptrs = k_ptr + h_kv * stride_kh + k_rows[None, :] + offs_d[:, None]
        k = load_tile(k_ptrs, readable[None, :], mask_d[:, None], True, HEAD_DIM != BLOCK_D)
        rows = offs_m[:, None]
        s, _ = shape_scores(
            dot(q, k.to(q.dtype)), rows, cols[None, :], slope, 0, S_q, length, scale, score
        )
        seen = readable[None, :]
        if right is not None:
            seen = seen & (cols[None, :] <= rows + (shift + right))
        if left is not None:
            seen = seen & (cols[None, :] >= rows + (shift + left))
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_scaled = tl.where(m_new == float("-inf"), 0.0, m_new) * factor
        p = tl.math.exp2(s * factor - m_scaled[:, None])
        alpha = tl.math.exp2(m_i * factor - m_scaled)
        l_i = l_i * alpha + tl.sum(p, 1)
        v_ptrs = v_ptr + h_kv * stride_vh + v_rows[:, None] + offs_dv[None, :]
        v = load_tile(v_ptrs, readable[:, None], mask_dv, True, HEAD_DIM_V != BLOCK_DV)
        acc = dot(p.to(q.dtype), v.to(q.dtype), acc * alpha[:, None])
        m_i = m_new

    if not is_shaped(score):
        m_i *= factor
    if sinks_ptr is not None:
        # in the first share alone: the merge then counts it once
        sink = tl.load(sinks_ptr + heads, mask=mask_m & (split == 0), other=float("-inf"))
        sink = sink.to(tl.float32) * LOG2_E
        m_new = tl.maximum(m_i, sink)
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.math.exp2(m_i - safe)
        acc *= alpha[:, None]
        l_i = l_i * alpha + tl.math.exp2(sink - safe)
        m_i = m_new
    empty = l_i == 0.0
    l_safe = tl.where(empty, 1.0, l_i)
    lse = tl.where(empty, float("-inf"), (m_i + tl.math.log2(l_safe)) * LN_2)
    # o (splits, B, S_q, H, D_v) and lse (splits, B, H, S_q), contiguous
    part = split.to(tl.int64) * B + b
    tl.store(lse_ptr + (part * H + heads) * S_q + offs_m, lse, mask=mask_m)
    o = acc * (value_scale / l_safe)[:, None]
    o_rows = ((part * S_q + offs_m) * H + heads) * HEAD_DIM_V
    o_ptrs = o_ptr + o_rows[:, None] + offs_dv[None, :]
    tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_dv)


@triton.jit
def _merge_kernel(
    parts_ptr, part_lse_ptr, o_ptr, lse_ptr,
    rows, H, S_q, splits,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: one row (b, i, h). Shares that saw no key weigh nothing."""
    row = tl.program_id(0).to(tl.int64)
    h = row % H
    i = row // H % S_q
    b = row // H // S_q
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_DV)
    at = (b * H + h) * S_q + i
    mask_s = offs_s < splits
    lse = tl.load(part_lse_ptr + offs_s.to(tl.int64) * rows + at, mask=mask_s, other=float("-inf"))
    top = tl.max(lse, 0)
    weight = tl.math.exp2((lse - tl.where(top == float("-inf"), 0.0, top)) * LOG2_E)
    total = tl.sum(weight, 0)
    safe = tl.where(total == 0.0, 1.0, total)
    parts_ptrs = (
        parts_ptr + (offs_s.to(tl.int64) * rows + row)[:, None] * HEAD_DIM_V + offs_d[None, :]
    )
    mask_d = offs_d < HEAD_DIM_V
    parts = tl.load(parts_ptrs, mask=mask_s[:, None] & mask_d[None, :], other=0.0)
    o = tl.sum(parts * weight[:, None], 0) / safe
    tl.store(o_ptr + row * HEAD_DIM_V + offs_d, o.to(o_ptr.dtype.element_ty), mask=mask_d)
    tl.store(lse_ptr + at, tl.where(total == 0.0, float("-inf"), top + tl.math.log2(safe) * LN_2))


# --- launch -------------------------------------------------------------------------------------

MAX_SPLITS = 64


def _splits(programs: int, tiles: int, x: Tensor) -> int:
    """Shares a sequence: two programs for each multiprocessor, four tiles of keys or more each."""
    wanted = 2 * multiprocessors(x.device) // max(programs, 1)
    return max(1, min(wanted, tiles // 4, MAX_SPLITS))


def _fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    scales: Tensor | None,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    B, S_q, H, _ = q.shape
    o = q.new_empty(B, S_q, H, v_cache.shape[3])
    return o, q.new_empty(B, H, S_q, dtype=torch.float32)


@torch_op("flash_attention_decode", fake=_fake)
def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    scales: Tensor | None,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """Launches both kernels: o (B, S_q, H, D_v) and lse (B, H, S_q)."""
    o, lse = _fake(
        q, k_cache, v_cache, cache_seqlens, block_table, slopes, sinks, scales,
        scale, left, right, softcap, num_splits,
    )  # fmt: skip
    if lse.numel() == 0:
        return o, lse
    B, S_q, H, D = q.shape
    page, H_kv, D_v = v_cache.shape[1:]
    capacity = page if block_table is None else block_table.shape[1] * page
    q, k_cache, v_cache = rows_strided(q), rows_strided(k_cache), rows_strided(v_cache)
    rows = H // H_kv * S_q
    block_m = min(64, max(16, triton.next_power_of_2(rows)))
    block_d, block_dv = block_d_of(D), block_d_of(D_v)
    block_n = 64 if max(block_d, block_dv) <= 128 and q.dtype.itemsize == 2 else 32
    programs = B * H_kv * triton.cdiv(rows, block_m)
    splits = num_splits or _splits(programs, triton.cdiv(capacity, block_n), q)
    if splits > 1:
        parts = o.new_empty(splits, *o.shape, dtype=torch.float32)
        part_lse = lse.new_empty(splits, *lse.shape)
    else:
        parts, part_lse = o, lse
    _decode_kernel[(programs * splits,)](
        q, k_cache, v_cache, parts, part_lse, cache_seqlens, block_table, sinks, scales,
        score_of(softcap, slopes, None, 0.0, None),
        *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
        None if block_table is None else block_table.stride(0),
        B, H, S_q, capacity, k_cache.shape[0], left, right, scale, splits,
        GROUP=H // H_kv, PAGE=page if block_table is not None else None,
        HEAD_DIM=D, HEAD_DIM_V=D_v, BLOCK_D=block_d, BLOCK_DV=block_dv,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(lse.numel(),)](
            parts, part_lse, o, lse,
            lse.numel(), H, S_q, splits,
            HEAD_DIM_V=D_v, BLOCK_DV=block_dv, BLOCK_S=triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
    return o, lse
