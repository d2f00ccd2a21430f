r"""The forward kernel: one pass over the keys with a running softmax (Dao 2023).

For each tile of queries, with c = scale * log2(e), over tiles of keys:

    s = q k^T                        m' = max(m, max_j s)        p = 2^(c s - c m')
    l = l 2^(c m - c m') + sum_j p   acc = acc 2^(c m - c m') + p v

then o = acc / l and lse = (c m + log2 l) ln 2. Tiles that every query of the tile sees whole are
taken without a mask; those on the edge of the band, and the tail, with one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import block_d_of, dot, key_range, load_tile, seen_keys, tile_of

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _attend(
    acc, l_i, m_i, q, k_ptr, v_ptr, start, stop,
    stride_kn, stride_vn, S_k, offs_m, left, right, qk_scale,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The running softmax over keys start..stop, taken a tile at a time."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    k_offs = offs_n[None, :] * stride_kn + offs_d[:, None]
    v_offs = offs_n[:, None] * stride_vn + offs_d[None, :]
    mask_d = offs_d < HEAD_DIM
    for n in tl.range(start, stop, BLOCK_N):
        n = tl.multiple_of(n, BLOCK_N)
        mask_n = n + offs_n < S_k
        k_ptrs = k_ptr + tl.cast(n, tl.int64) * stride_kn + k_offs
        k = load_tile(k_ptrs, mask_n[None, :], mask_d[:, None], MASKED, HEAD_DIM != BLOCK_D)
        s = dot(q, k)
        if MASKED:
            seen = seen_keys(
                offs_m[:, None], (n + offs_n)[None, :], left, right, S_k, HAS_LEFT, HAS_RIGHT
            )
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        # -inf - -inf would be NaN where a row has seen no key yet
        m_scaled = tl.where(m_new == float("-inf"), 0.0, m_new) * qk_scale
        p = tl.math.exp2(s * qk_scale - m_scaled[:, None])
        alpha = tl.math.exp2(m_i * qk_scale - m_scaled)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v_ptrs = v_ptr + tl.cast(n, tl.int64) * stride_vn + v_offs
        v = load_tile(v_ptrs, mask_n[:, None], mask_d[None, :], MASKED, HEAD_DIM != BLOCK_D)
        acc = dot(p.to(v.dtype), v, acc)
        m_i = m_new
    return acc, l_i, m_i


@triton.jit(do_not_specialize=["left", "right"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_ob, stride_om, stride_oh,
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
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    rows = offs_m.to(tl.int64)[:, None]
    mask_m = offs_m < S_q
    mask_d = (offs_d < HEAD_DIM)[None, :]
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + rows * stride_qm + offs_d[None, :]
    q = load_tile(q_ptrs, mask_m[:, None], mask_d, True, HEAD_DIM != BLOCK_D)

    qk_scale = scale * LOG2_E
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = tl.minimum(first + BLOCK_M, S_q) - 1
    begin, full_begin, full_end, end = key_range(
        first, last, left, right, S_k, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    if HAS_LEFT:
        acc, l_i, m_i = _attend(
            acc, l_i, m_i, q, k_ptr, v_ptr, begin, tl.minimum(full_begin, end),
            stride_kn, stride_vn, S_k, offs_m, left, right, qk_scale,
            True, HAS_LEFT, HAS_RIGHT, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, l_i, m_i = _attend(
        acc, l_i, m_i, q, k_ptr, v_ptr, full_begin, full_end,
        stride_kn, stride_vn, S_k, offs_m, left, right, qk_scale,
        False, HAS_LEFT, HAS_RIGHT, HEAD_DIM, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, l_i, m_i = _attend(
        acc, l_i, m_i, q, k_ptr, v_ptr, tl.maximum(full_begin, full_end), end,
        stride_kn, stride_vn, S_k, offs_m, left, right, qk_scale,
        True, HAS_LEFT, HAS_RIGHT, HEAD_DIM, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    empty = l_i == 0.0
    l_safe = tl.where(empty, 1.0, l_i)
    lse = tl.where(empty, float("-inf"), (m_i * qk_scale + tl.math.log2(l_safe)) * LN_2)
    tl.store(lse_ptr + pid_bh * S_q + offs_m, lse, mask=mask_m)
    o = acc / l_safe[:, None]
    o_ptrs = o_ptr + b * stride_ob + h * stride_oh + rows * stride_om + offs_d[None, :]
    tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_d)


# --- launch -------------------------------------------------------------------------------------


def rows_strided(x: Tensor) -> Tensor:
    """``x`` (B, S, H, D) itself where kernels can address it, else a copy.

    Kernels want a last stride of 1, and 32-bit offsets inside a tile of rows.
    """
    if (x.stride(3) == 1 or x.shape[3] == 1) and x.stride(1) < 2**23:
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def band(left: int | None, right: int | None, S_q: int, S_k: int) -> tuple[int | None, int | None]:
    """The same band of diagonals with sides that hide nothing taken away."""
    if left is not None and left <= -(S_q - 1):
        left = None
    if right is not None and right >= S_k - 1:
        right = None
    return left, right


def forward_fake(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int | None, right: int | None
) -> tuple[Tensor, Tensor]:
    """Empty o (B, S_q, H, D) and lse (B, H, S_q)."""
    B, S_q, H, _ = q.shape
    o = q.new_empty(B, S_q, H, v.shape[3])
    return o, q.new_empty(B, H, S_q, dtype=torch.float32)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int | None, right: int | None
) -> tuple[Tensor, Tensor]:
    """Attention of q (B, S_q, H, D) over k, v (B, S_k, H_kv, D): o and lse."""
    o, lse = forward_fake(q, k, v, scale, left, right)
    B, S_q, H, D = q.shape
    S_k, H_kv = k.shape[1], k.shape[2]
    if lse.numel() == 0:
        return o, lse
    if S_k == 0:
        return o.zero_(), lse.fill_(float("-inf"))
    q, k, v = rows_strided(q), rows_strided(k), rows_strided(v)
    left, right = band(left, right, S_q, S_k)
    block_d = block_d_of(D)
    tile = tile_of("forward", q, block_d)
    _forward_kernel[(triton.cdiv(S_q, tile.m) * B * H,)](
        q, k, v, o, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
        H, S_q, S_k, left or 0, right or 0, scale,
        GROUP=H // H_kv, HAS_LEFT=left is not None, HAS_RIGHT=right is not None,
        HEAD_DIM=D, BLOCK_D=block_d, **tile.options(),
    )  # fmt: skip
    return o, lse
