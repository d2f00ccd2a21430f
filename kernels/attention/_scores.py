r"""What a score is: softcap, ALiBi, bias and mask, which keys a query sees, and dropout.

Every kernel takes these functions, so that forward and backward cannot disagree. An option that is
off is None, hence a compile-time constant: it leaves nothing in the machine code.

    s_ij = softcap(scale q_i k_j) - slope |i + S_k - S_q - j| + bias_ij, left <= j - i <= right
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._maths import LOG2_E

LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028e38)  # of float32, with room for a rounding
ROUNDS = tl.constexpr(7)  # of Philox; 7 pass every test of BigCrush (Salmon et al. 2011, table 2)


class Score(NamedTuple):
    """What kernels read to shape a score; None where an option is off."""

    softcap: float | None
    slopes_ptr: Tensor | None  # (B or 1, H) float32
    stride_slopes: int | None  # 0 where batches share the slopes
    bias_ptr: Tensor | None  # a float is added, a bool says which keys to keep
    stride_bb: int | None
    stride_bh: int | None
    stride_bm: int | None
    stride_bn: int | None
    dropout_p: float | None
    seed_ptr: Tensor | None  # one int64


def strides_of(x: Tensor) -> tuple[int, ...]:
    """Strides by which a tensor that broadcasts is read: 0 along a dimension of size 1."""
    return tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))


def score_of(
    softcap: float,
    slopes: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Score:
    """The kernels' record of the options."""
    drops = dropout_p > 0.0
    by_batch = strides_of(slopes)[0] if slopes is not None else None
    b, h, m, n = strides_of(bias) if bias is not None else (None,) * 4
    p, seed = (dropout_p, seed) if drops else (None, None)
    return Score(softcap or None, slopes, by_batch, bias, b, h, m, n, p, seed)


@triton.jit
def is_shaped(score):
    """Whether scores are more than scale q k^T; a constant."""
    return (
        (score.softcap is not None)
        or (score.slopes_ptr is not None)
        or (score.bias_ptr is not None)
    )


@triton.jit
def head_of(b, h, H, score):
    """What one head's scores need: its slope in base 2, its bias, and the dropout seed."""
    slope = 0.0
    bias_ptr = 0
    seed = 0
    if score.slopes_ptr is not None:
        slope = tl.load(score.slopes_ptr + b * score.stride_slopes + h) * LOG2_E
    if score.bias_ptr is not None:
        bias_ptr = score.bias_ptr + b * score.stride_bb + h * score.stride_bh
    if score.dropout_p is not None:
        seed = tl.load(score.seed_ptr)
    return slope, bias_ptr, seed


@triton.jit
def tanh(x):
    """To about 1e-7 of 1; near 0 by its series, where 1 - 2 / (e^2x + 1) would cancel."""
    square = x * x
    series = x + x * square * (
        -1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * 62 / 2835))
    )
    return tl.where(square < 0.0625, series, 1 - 2 / (tl.math.exp2(x * (2 * LOG2_E)) + 1))


@triton.jit
def shape_scores(qk, rows, cols, slope, bias_ptr, S_q, S_k, scale, score):
    """Base-2 scores from q k^T, and d score / d (scale q k^T); rows and cols broadcast to the tile.

    Plain scores come back as they are: the caller's exponential multiplies by the scale.
    """
    s = qk
    slack = 1.0
    if score.softcap is not None:
        th = tanh(qk * (scale / score.softcap))
        s = th * (score.softcap * LOG2_E)
        slack = 1.0 - th * th
    elif is_shaped(score):
        s = qk * (scale * LOG2_E)
    if score.slopes_ptr is not None:
        s -= slope * tl.abs(rows + (S_k - S_q) - cols).to(tl.float32)
    if score.bias_ptr is not None:
        # clamped, not masked: what lies past the ends is hidden or not stored
        row = tl.minimum(rows, S_q - 1).to(tl.int64)
        col = tl.minimum(cols, S_k - 1).to(tl.int64)
        bias = tl.load(bias_ptr + row * score.stride_bm + col * score.stride_bn)
        if score.bias_ptr.dtype.element_ty == tl.int1:
            s = tl.where(bias, s, float("-inf"))
        else:
            # the least bias of a type stands for a mask, and a row of nothing else has an answer
            bias = bias.to(tl.float32)
            least = tl.maximum(bias * LOG2_E, LOWEST, propagate_nan=tl.PropagateNan.ALL)
            s += tl.where(bias == float("-inf"), bias, least)
    return s, slack


@triton.jit
def kept(rows, cols, head, seed, score):
    """Which weights dropout keeps: Philox keyed by (seed, head of the batch, i, j)."""
    zero = rows * 0 + cols * 0
    draw, _, _, _ = tl.philox(
        seed, (zero + cols), (zero + rows), (zero + head.to(tl.int32)), zero, n_rounds=ROUNDS
    )
    threshold = tl.minimum(score.dropout_p * 2147483648.0, 2147483520.0).to(tl.int32)
    return (draw.to(tl.uint32, bitcast=True) >> 1).to(tl.int32) >= threshold


# --- block-sparse masks -------------------------------------------------------------------------

SPARSE_BLOCK = 128  # queries and keys of one entry of a block mask, as FlexAttention's default
SPARSE = tl.constexpr(SPARSE_BLOCK)


class Blocks(NamedTuple):
    """For each row of blocks, how many it visits and which; along keys for dk and dv."""

    counts_ptr: Tensor  # (B or 1, H or 1, rows) int32
    indices_ptr: Tensor  # (B or 1, H or 1, rows, columns) int32
    stride_b: int
    stride_h: int
    columns: int


def blocks_of(mask: Tensor | None, *, by_key: bool = False) -> Blocks | None:
    """The lists of a bool block mask (B or 1, H or 1, row blocks, column blocks)."""
    if mask is None:
        return None
    if by_key:
        mask = mask.mT
    b, h, _ = strides_of(mask.new_empty(mask.shape[:3], device="meta"))
    counts = mask.sum(-1, dtype=torch.int32)
    indices = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return Blocks(counts.contiguous(), indices.contiguous(), b, h, mask.shape[3])


@triton.jit
def visited(blocks, b, h, row):
    """How many blocks a row of blocks visits, and where they are listed."""
    at = b * blocks.stride_b + h * blocks.stride_h + row
    return tl.load(blocks.counts_ptr + at), blocks.indices_ptr + at * blocks.columns


@triton.jit
def listed(t, blocks, list_ptr):
    """Where the t-th row or column in a list of blocks lies."""
    if blocks is not None:
        t = tl.cast(t, tl.int32)
        t = tl.load(list_ptr + t // SPARSE) * SPARSE + t % SPARSE
    return t


# --- which keys a query sees --------------------------------------------------------------------


@triton.jit
def key_range(first, last, left, right, S_k, BLOCK_N: tl.constexpr):
    """For queries first..last: tiles of keys in [begin, full_begin), [.., full_end), [.., end).

    Query i sees key j where left <= j - i <= right. The middle range needs no mask.
    """
    begin = 0
    full_begin = 0
    if left is not None:
        begin = tl.maximum(first + left, 0) // BLOCK_N * BLOCK_N
        full_begin = tl.cdiv(tl.maximum(last + left, 0), BLOCK_N) * BLOCK_N
    end = S_k
    full_end = S_k // BLOCK_N * BLOCK_N
    if right is not None:
        end = tl.minimum(S_k, tl.maximum(last + right + 1, 0))
        full_end = tl.minimum(S_k, tl.maximum(first + right + 1, 0)) // BLOCK_N * BLOCK_N
    return begin, full_begin, full_end, end


@triton.jit
def query_range(first, last, left, right, S_q, BLOCK_M: tl.constexpr):
    """The same for keys first..last: key j is seen by the queries j - right <= i <= j - left."""
    begin = 0
    full_begin = 0
    if right is not None:
        begin = tl.maximum(first - right, 0) // BLOCK_M * BLOCK_M
        full_begin = tl.cdiv(tl.maximum(last - right, 0), BLOCK_M) * BLOCK_M
    end = S_q
    full_end = S_q // BLOCK_M * BLOCK_M
    if left is not None:
        end = tl.minimum(S_q, tl.maximum(last - left + 1, 0))
        full_end = tl.minimum(S_q, tl.maximum(first - left + 1, 0)) // BLOCK_M * BLOCK_M
    return begin, full_begin, full_end, end


@triton.jit
def seen_keys(offs_m, offs_n, left, right, S_k):
    """Which keys each query sees; the limits merge to one integer a row before they spread."""
    last = S_k - 1
    if right is not None:
        last = tl.minimum(offs_m + right, last)
    seen = offs_n <= last
    if left is not None:
        seen = seen & (offs_n >= offs_m + left)
    return seen


@triton.jit
def seen_queries(offs_m, offs_n, left, right, S_k):
    """The same for a tile of keys by queries, of which a thread holds few keys and many queries.

    Two limits of each key take fewer registers; of one alone ptxas (CUDA 12.8) makes more spills.
    """
    if left is None or right is None:
        seen = seen_keys(offs_m, offs_n, left, right, S_k)
    else:
        seen = (offs_m >= offs_n - right) & (offs_m <= offs_n - left)
    return seen


# --- ragged batches -----------------------------------------------------------------------------


@triton.jit
def locate(pid, S, heads, B, cu_seqlens, BLOCK: tl.constexpr):
    """Batch, head and tile of a program, and the sequence's first row and length.

    Ragged sequence b has the tiles from cu_seqlens[b] // BLOCK + b on, and maybe an idle one after:
    so tiles are numbered, and a program finds its own, with no one knowing the longest length.
    """
    if cu_seqlens is None:
        tiles = tl.cdiv(S, BLOCK)
        tile = pid % tiles
        b = (pid // tiles // heads).to(tl.int64)
        h = (pid // tiles % heads).to(tl.int64)
        start = 0
        length = S
    else:
        tiles = S // BLOCK + B
        t = pid % tiles
        h = (pid // tiles).to(tl.int64)
        low = pid * 0
        high = low + B
        while low + 1 < high:
            middle = (low + high) // 2
            after = tl.load(cu_seqlens + middle) // BLOCK + middle <= t
            low = tl.where(after, middle, low)
            high = tl.where(after, high, middle)
        start = tl.load(cu_seqlens + low).to(tl.int32)
        length = tl.load(cu_seqlens + low + 1).to(tl.int32) - start
        tile = t - (start // BLOCK + low)
        b = low.to(tl.int64)
    return b, h, tile, start, length


def tiles_of(S: int, B: int, block: int, cu_seqlens: Tensor | None) -> int:
    """Programs a head: whole tiles of S rows a batch, or as ``locate`` numbers ragged ones."""
    return S // block + B if cu_seqlens is not None else triton.cdiv(S, block) * B


# --- dropout, in PyTorch ------------------------------------------------------------------------

_MASK = 0xFFFFFFFF


def dropout_mask(seed: Tensor, dropout_p: float, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The kernels' keep mask by the same Philox in int64 arithmetic.

    ``head`` is b H + h; it, i and j are int64 and broadcast to the mask's shape.
    """
    c = [j, i, head, torch.zeros_like(j)]  # two rounds of seven are done before they have met
    key = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(ROUNDS.value):
        low_a, high_a = _product(c[0], 0xD2511F53)
        low_b, high_b = _product(c[2], 0xCD9E8D57)
        c = [high_b ^ c[1] ^ key[0], low_b, high_a ^ c[3] ^ key[1], low_a]
        key = [(key[0] + 0x9E3779B9) & _MASK, (key[1] + 0xBB67AE85) & _MASK]
    scaled = torch.tensor(dropout_p, dtype=torch.float32) * 2147483648.0
    threshold = int(scaled.clamp(max=2147483520.0))
    return (c[0] >> 1) >= threshold


def _product(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of a 32 by 32 bit product: int64 wraps, and its bits are still right."""
    product = x * constant
    return product & _MASK, (product >> 32) & _MASK
