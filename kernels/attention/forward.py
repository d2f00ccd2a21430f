r"""The forward kernel: one pass over the keys with a running softmax (Dao 2023).

For each tile of queries, over tiles of keys, with scores s in base 2:

    m' = max(m, max_j s)        p = 2^(s - m')
    l = l 2^(m - m') + sum_j p        acc = acc 2^(m - m') + p v

then o = acc / l and lse = (m + log2 l) ln 2. A sink joins l at the end. Tiles that every query of
the tile sees whole are taken without a mask; those on the edge of the band, and the tail, with one.
Its warp-specialised forms are in specialised.py.

m starts at the least float32 that its factor keeps finite, so that m - m' is never inf - inf. l is
kept in ``SUMS`` columns a row, which meet once, at the end.

A large lse is rounded, which shows in the backward's e^(s - lse): with float32 inputs, or a bias
that stands for a mask. There peaks keep m, +inf of a row that saw no key, and gain = 1 / l instead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._maths import LOG2_E
from ._scores import (
    LN_2,
    LOWEST,
    SPARSE,
    blocks_of,
    head_of,
    is_shaped,
    kept,
    key_range,
    listed,
    locate,
    score_of,
    seen_keys,
    shape_scores,
    tiles_of,
    visited,
)
from ._tiles import (
    block_d_of,
    chunks_of,
    described,
    dot,
    load_rows,
    load_tile,
    partial_sums,
    tile_of,
)
from .specialised import form_of, launched

# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _sums(p, SUMS: tl.constexpr):
    """Each row's sum in so many columns: as ``partial_sums`` says, each within a thread."""
    M: tl.constexpr = p.shape[0]
    N: tl.constexpr = p.shape[1]
    if SUMS == 8:
        sums = tl.sum(p.reshape(M, N // SUMS, SUMS), 1)
    else:
        sums = tl.sum(p.reshape(M, SUMS, N // SUMS), 2)
    return sums


@triton.jit
def _attend(
    acc, l_i, m_i, q, q_rest, k_ptr, k_rest_ptr, v_ptr, b, h_kv, start, stop,
    stride_kn, stride_vn, S_q, S_k, offs_m, left, right, scale, score, slope, bias_ptr, head, seed,
    blocks, list_ptr, MASKED: tl.constexpr, ALIKE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, SPECIALISED: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """The running softmax over keys start..stop, taken a tile at a time."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    k_offs = offs_n[:, None] * stride_kn + offs_d[None, :]
    v_offs = k_offs  # shared, they take half the registers
    if not ALIKE:
        v_offs = offs_n[:, None] * stride_vn + offs_dv[None, :]
    mask_d = (offs_d < HEAD_DIM)[None, :]
    mask_dv = (offs_dv < HEAD_DIM_V)[None, :]
    factor = 1.0 if is_shaped(score) else scale * LOG2_E
    for t in tl.range(start, stop, BLOCK_N, warp_specialize=SPECIALISED):
        n = tl.multiple_of(listed(t, blocks, list_ptr), BLOCK_N)
        mask_n = n + offs_n < S_k
        if TMA:
            k = load_rows(k_ptr, b, n, h_kv, BLOCK_N, BLOCK_D).T
        else:
            k_ptrs = k_ptr + tl.cast(n, tl.int64) * stride_kn + k_offs
            k = load_tile(k_ptrs, mask_n[:, None], mask_d, MASKED, HEAD_DIM < BLOCK_D).T
        qk = dot(q, k)
        if BLOCK_E is not None:
            if TMA:
                k = load_rows(k_rest_ptr, b, n, h_kv, BLOCK_N, BLOCK_E, BLOCK_D).T
            else:
                offs_e = BLOCK_D + tl.arange(0, BLOCK_E)[None, :]
                k_ptrs = k_ptr + tl.cast(n, tl.int64) * stride_kn + offs_n[:, None] * stride_kn
                k = load_tile(
                    k_ptrs + offs_e, mask_n[:, None], offs_e < HEAD_DIM, MASKED,
                    HEAD_DIM < BLOCK_D + BLOCK_E,
                ).T  # fmt: skip
            qk = dot(q_rest, k, qk)
        rows = offs_m[:, None]
        cols = (n + offs_n)[None, :]
        s, _ = shape_scores(qk, rows, cols, slope, bias_ptr, S_q, S_k, scale, score)
        if MASKED:
            s = tl.where(seen_keys(rows, cols, left, right, S_k), s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_scaled = m_new * factor
        alpha = tl.math.exp2(m_i * factor - m_scaled)
        acc = acc * alpha[:, None]  # before p: after it, ptxas (CUDA 12.8) spills on sm_80
        p = tl.math.exp2(s * factor - m_scaled[:, None])
        l_i = l_i * alpha[:, None] + _sums(p, SUMS)
        if score.dropout_p is not None:
            p = tl.where(kept(rows, cols, head, seed, score), p, 0.0)
        if TMA:
            v = load_rows(v_ptr, b, n, h_kv, BLOCK_N, BLOCK_DV)
        else:
            v_ptrs = v_ptr + tl.cast(n, tl.int64) * stride_vn + v_offs
            v = load_tile(v_ptrs, mask_n[:, None], mask_dv, MASKED, HEAD_DIM_V != BLOCK_DV)
        acc = dot(p.to(v.dtype), v, acc)
        m_i = m_new
    return acc, l_i, m_i


@triton.jit(do_not_specialize=["left", "right"])
def _forward_kernel(  # noqa: C901, PLR0915
    q_ptr, k_ptr, k_rest_ptr, v_ptr, o_ptr, lse_ptr, peak_ptr, gain_ptr,
    cu_seqlens_q, cu_seqlens_k, sinks_ptr, score, blocks,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_ob, stride_om, stride_oh,
    B, H, S_q, S_k, left, right, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIKE: tl.constexpr, TMA: tl.constexpr,
    SPECIALISED: tl.constexpr, ONE_LOOP: tl.constexpr, WHOLE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. Ragged batches lie end to end in batch 0."""
    pid = tl.program_id(0)
    if right is not None:
        pid = tl.num_programs(0) - 1 - pid  # the longest rows first: the last programs are short
    total_q = S_q
    b, h, pid_m, start_q, S_q = locate(pid, S_q, H, B, cu_seqlens_q, BLOCK_M)
    first = pid_m * BLOCK_M
    if cu_seqlens_q is not None:
        if first >= S_q:
            return
        start_k = tl.load(cu_seqlens_k + b).to(tl.int64)
        S_k = tl.load(cu_seqlens_k + b + 1).to(tl.int32) - start_k.to(tl.int32)
        q_ptr += tl.cast(start_q, tl.int64) * stride_qm
        o_ptr += tl.cast(start_q, tl.int64) * stride_om
        k_ptr += start_k * stride_kn
        v_ptr += start_k * stride_vn
        stats = h * total_q + start_q
        if left is not None:
            left += S_k - S_q
        if right is not None:
            right += S_k - S_q
    else:
        q_ptr += b * stride_qb
        o_ptr += b * stride_ob
        stats = (b * H + h) * S_q
    h_kv = h // GROUP
    TWINS: tl.constexpr = TMA and BLOCK_D == BLOCK_DV and BLOCK_D >= 128 and BLOCK_D < 512
    if TWINS and not SPECIALISED:  # noqa: SIM102
        # ptxas computes an argument's address again in each turn of a loop (16 of 485 instructions
        # on sm_90), but keeps one that was chosen. Without keys there are no descriptors.
        if S_k == 0:
            k_ptr, v_ptr = v_ptr, k_ptr
    if not TMA:
        k_ptr += h_kv * stride_kh
        v_ptr += h_kv * stride_vh
        if cu_seqlens_q is None:
            k_ptr += b * stride_kb
            v_ptr += b * stride_vb

    offs_m = first + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = offs_m.to(tl.int64)[:, None]
    mask_m = offs_m < S_q
    q_ptr += h * stride_qh
    q_rest = None
    if ONE_LOOP:
        q_tiles = tl.make_tensor_descriptor(
            q_ptr, [S_q, HEAD_DIM], [stride_qm, 1], [BLOCK_M, BLOCK_D]
        )
        q = load_rows(q_tiles, None, first, None, BLOCK_M, BLOCK_D)
    else:
        q_ptrs = q_ptr + rows * stride_qm + offs_d[None, :]
        mask_d = (offs_d < HEAD_DIM)[None, :]
        q = load_tile(q_ptrs, mask_m[:, None], mask_d, True, HEAD_DIM < BLOCK_D)
    if BLOCK_E is not None:
        offs_e = BLOCK_D + tl.arange(0, BLOCK_E)[None, :]
        q_ptrs = q_ptr + rows * stride_qm + offs_e
        mask_e = offs_e < HEAD_DIM
        q_rest = load_tile(q_ptrs, mask_m[:, None], mask_e, True, HEAD_DIM < BLOCK_D + BLOCK_E)

    factor = 1.0 if is_shaped(score) else scale * LOG2_E
    m_i = tl.zeros([BLOCK_M], tl.float32) + LOWEST / tl.maximum(factor, 1.0)
    l_i = tl.zeros([BLOCK_M, SUMS], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    slope, bias_ptr, seed = head_of(b, h, H, score)
    head = b * H + h
    last = tl.minimum(first + BLOCK_M, S_q) - 1
    begin, full_begin, full_end, end = key_range(first, last, left, right, S_k, BLOCK_N)
    if blocks is not None:
        count, list_ptr = visited(blocks, b, h, first // SPARSE)
        acc, l_i, m_i = _attend(
            acc, l_i, m_i, q, q_rest, k_ptr, k_rest_ptr, v_ptr, b, h_kv, 0, count * SPARSE,
            stride_kn, stride_vn, S_q, S_k, offs_m, left, right, scale,
            score, slope, bias_ptr, head, seed, blocks, list_ptr,
            True, ALIKE, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_E, BLOCK_DV, BLOCK_N, TMA,
            SPECIALISED, SUMS,
        )  # fmt: skip
    elif ONE_LOOP:
        k_tiles = tl.make_tensor_descriptor(
            k_ptr, [S_k, HEAD_DIM], [stride_kn, 1], [BLOCK_N, BLOCK_D]
        )
        v_tiles = tl.make_tensor_descriptor(
            v_ptr, [S_k, HEAD_DIM_V], [stride_vn, 1], [BLOCK_N, BLOCK_DV]
        )
        acc, l_i, m_i = _attend(
            acc, l_i, m_i, q, None, k_tiles, None, v_tiles, None, None, begin, end,
            stride_kn, stride_vn, S_q, S_k, offs_m, left, right, scale,
            score, slope, bias_ptr, head, seed, None, 0,
            not WHOLE, ALIKE, HEAD_DIM, HEAD_DIM_V, BLOCK_D, None, BLOCK_DV, BLOCK_N, True,
            SPECIALISED, SUMS,
        )  # fmt: skip
    else:
        if left is not None:
            acc, l_i, m_i = _attend(
                acc, l_i, m_i, q, q_rest, k_ptr, k_rest_ptr, v_ptr, b, h_kv, begin,
                tl.minimum(full_begin, end),
                stride_kn, stride_vn, S_q, S_k, offs_m, left, right, scale,
                score, slope, bias_ptr, head, seed, None, 0,
                True, ALIKE, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_E, BLOCK_DV, BLOCK_N, TMA,
                SPECIALISED, SUMS,
            )  # fmt: skip
        acc, l_i, m_i = _attend(
            acc, l_i, m_i, q, q_rest, k_ptr, k_rest_ptr, v_ptr, b, h_kv, full_begin, full_end,
            stride_kn, stride_vn, S_q, S_k, offs_m, left, right, scale,
            score, slope, bias_ptr, head, seed, None, 0,
            False, ALIKE, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_E, BLOCK_DV, BLOCK_N, TMA,
            SPECIALISED, SUMS,
        )  # fmt: skip
        acc, l_i, m_i = _attend(
            acc, l_i, m_i, q, q_rest, k_ptr, k_rest_ptr, v_ptr, b, h_kv,
            tl.maximum(full_begin, full_end), end,
            stride_kn, stride_vn, S_q, S_k, offs_m, left, right, scale,
            score, slope, bias_ptr, head, seed, None, 0,
            True, ALIKE, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_E, BLOCK_DV, BLOCK_N, TMA,
            SPECIALISED, SUMS,
        )  # fmt: skip

    l_i = tl.sum(l_i, 1)
    m_i *= factor
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2_E
        m_new = tl.maximum(m_i, sink)
        alpha = tl.math.exp2(m_i - m_new)
        acc *= alpha[:, None]
        l_i = l_i * alpha + tl.math.exp2(sink - m_new)
        m_i = m_new
    empty = l_i == 0.0
    l_safe = tl.where(empty, 1.0, l_i)
    lse = tl.where(empty, float("-inf"), (m_i + tl.math.log2(l_safe)) * LN_2)
    tl.store(lse_ptr + stats + offs_m, lse, mask=mask_m)
    if peak_ptr is not None:
        tl.store(peak_ptr + stats + offs_m, tl.where(empty, float("inf"), m_i), mask=mask_m)
        tl.store(gain_ptr + stats + offs_m, 1.0 / l_safe, mask=mask_m)
    if score.dropout_p is not None:
        l_safe *= 1.0 - score.dropout_p
    o = acc / l_safe[:, None]
    o_ptrs = o_ptr + h * stride_oh + rows * stride_om + offs_dv[None, :]
    mask_o = mask_m[:, None] & (offs_dv < HEAD_DIM_V)[None, :]
    tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=mask_o)


# --- launch -------------------------------------------------------------------------------------


def rows_strided(x: Tensor) -> Tensor:
    """``x`` (B, S, H, D) itself where kernels can address it, else a copy.

    Kernels want a last stride of 1, and 32-bit offsets inside a tile of rows.
    """
    if (x.stride(3) == 1 or x.shape[3] == 1) and x.stride(1) < 2**23:
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def rows_aligned(x: Tensor) -> Tensor:
    """The same, with heads of 8, 24, 40, ... numbers laid 16 apart: else each loads alone.

    Triton knows an address by its divisibility by 16 elements or not at all.
    """
    x = rows_strided(x)
    D = x.shape[3]
    if D % 16 != 8 or all(
        s % 16 == 0 for s, n in zip(x.stride()[:3], x.shape, strict=False) if n > 1
    ):
        return x
    B, S, H, _ = x.shape
    return x.new_empty(B, S, H, D + 8)[..., :D].copy_(x)


def sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many there are: the batch, or what the ragged batch of one holds."""
    return q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def band(
    left: int | None, right: int | None, S_q: int, S_k: int, cu_seqlens: Tensor | None
) -> tuple[int | None, int | None]:
    """The same band of diagonals with sides that hide nothing taken away."""
    if cu_seqlens is None and left is not None and left <= -(S_q - 1):
        left = None
    if cu_seqlens is None and right is not None and right >= S_k - 1:
        right = None
    return left, right


def forward_fake(
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
    block_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty o (B, S_q, H, D_v), lse (B, H, S_q) and peaks (2, B, H, S_q), or (0,) if not kept."""
    B, S_q, H, _ = q.shape
    o = q.new_empty(B, S_q, H, v.shape[3])
    lse = q.new_empty(B, H, S_q, dtype=torch.float32)
    kept = q.dtype == torch.float32 or (bias is not None and bias.dtype != torch.bool)
    return o, lse, lse.new_empty((2, *lse.shape) if kept else 0)


def forward(
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
    block_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of q (B, S_q, H, D) over k and v (B, S_k, H_kv, D or D_v): o, lse and peaks.

    Keys left <= j - i <= right are seen. With ``cu_seqlens`` B is 1, the sequences lie end to end,
    and the band counts from the last rows.
    """
    o, lse, peaks = forward_fake(
        q, k, v, sinks, bias, slopes, seed, cu_seqlens_q, cu_seqlens_k,
        scale, left, right, softcap, dropout_p,
    )  # fmt: skip
    B, S_q, H, D = q.shape
    S_k, H_kv, D_v = v.shape[1:]
    if cu_seqlens_q is not None:  # rows past the last sequence have no program
        o.zero_()
        lse.fill_(float("-inf"))
        peaks[:1] = float("inf")
        peaks[1:] = 1.0
    B = sequences(q, cu_seqlens_q)
    if lse.numel() == 0 or B == 0:
        return o, lse, peaks
    q, k, v = rows_aligned(q), rows_aligned(k), rows_aligned(v)
    sinks = None if sinks is None else sinks.contiguous()
    left, right = band(left, right, S_q, S_k, cu_seqlens_q)
    (block_d, block_e), block_dv = chunks_of(D), block_d_of(D_v)
    width = max(block_d + (64 if block_e else 0), block_dv)
    alike = D_v == D and block_e is None and k.stride(1) == v.stride(1)
    score = score_of(softcap, slopes, bias, dropout_p, seed)
    plain = left is None and block_mask is None and all(option is None for option in score)
    numbers = (k.data_ptr(), v.data_ptr(), *k.stride()[:3], *v.stride()[:3])
    wide = not any(n % 16 for n in numbers)  # copies of 16 bytes, by what Triton knows of these
    busy = not (plain and alike and wide and cu_seqlens_q is None)
    crowded = bias is not None or dropout_p > 0
    tile = tile_of("forward", q, width, busy=busy, crowded=crowded)
    # descriptors pay in this kernel alone: dq and dkdv compile to more instructions with them
    k_tiles, v_tiles = described(k, tile.n, block_d), described(v, tile.n, block_dv)
    tma = cu_seqlens_q is None and k_tiles is not None and v_tiles is not None
    k_rest = described(k, tile.n, block_e) if block_e is not None and tma else None
    grid = (tiles_of(S_q, B, tile.m, cu_seqlens_q) * H,)

    def launch(k_given: Tensor | TensorDescriptor, v_given: Tensor | TensorDescriptor, **options):
        _forward_kernel[grid](
            q, k_given, k_rest, v_given, o, lse, *(peaks if peaks.numel() else (None, None)),
            cu_seqlens_q, cu_seqlens_k, sinks, score, blocks_of(block_mask),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
            B, H, S_q, S_k, left, right, scale,
            GROUP=H // H_kv, HEAD_DIM=D, HEAD_DIM_V=D_v, BLOCK_D=block_d, BLOCK_E=block_e,
            BLOCK_DV=block_dv, ALIKE=alike, SUMS=partial_sums(tile, q, width), **options,
        )  # fmt: skip

    if tile.specialised and tma and plain:
        form = form_of(tile, q, k_tiles, v_tiles, right)
        given = (k, v) if form and form.one_loop else (k_tiles, v_tiles)
        if form and launched(
            (D, D_v, right is None, tile, form), q, lambda: launch(*given, **form.options(tile))
        ):
            return o, lse, peaks
    launch(
        k_tiles if tma else k, v_tiles if tma else v,
        TMA=tma, SPECIALISED=False, ONE_LOOP=False, WHOLE=False, **tile.options(),
    )  # fmt: skip
    return o, lse, peaks
