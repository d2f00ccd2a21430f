"""``flash_attention_decode``: the newest tokens over a key-value cache; forward only."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch import dispatched
from .._op import Inputs, Op
from . import flash
from .eager import weigh
from .splits import MAX_SPLITS, decode

# --- public -------------------------------------------------------------------------------------

_CACHE_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    num_splits: int,
) -> None:
    """Raises where the tensors are not queries over a cache."""
    op = "flash_attention_decode"
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if t.dim() != 4:
            raise ValueError(f"{op}: {name} must have 4 dimensions; got {tuple(t.shape)}")
    B, _, H, D = q.shape
    n, S, H_kv, D_k = k_cache.shape
    if D_k != D or H_kv == 0 or H % H_kv:
        raise ValueError(
            f"{op}: k_cache must be (..., H_kv, {D}) with H_kv a divisor of {H}; "
            f"got {tuple(k_cache.shape)}"
        )
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(f"{op}: v_cache must be {(n, S, H_kv, 'D_v')}; got {tuple(v_cache.shape)}")
    if tuple(cache_seqlens.shape) != (B,) or cache_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{op}: cache_seqlens must be ({B},) int32 or int64; "
            f"got {tuple(cache_seqlens.shape)} {cache_seqlens.dtype}"
        )
    _check_cache(q, k_cache, v_cache, block_table)
    if not 0 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"{op}: num_splits must be 0 (chosen) to {MAX_SPLITS}; got {num_splits}")


def _check_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None) -> None:
    """Raises where the cache's dtype or its pages do not fit."""
    op, B = "flash_attention_decode", q.shape[0]
    n, S = k_cache.shape[:2]
    if k_cache.dtype != v_cache.dtype or k_cache.dtype not in (q.dtype, *_CACHE_DTYPES):
        raise ValueError(
            f"{op}: k_cache and v_cache must have q's dtype, {q.dtype}, or be int8 or float8; "
            f"got {k_cache.dtype} and {v_cache.dtype}"
        )
    if block_table is None and n != B:
        raise ValueError(f"{op}: k_cache must have q's batch, {B}, without a block_table; got {n}")
    if block_table is not None and (block_table.dim() != 2 or block_table.shape[0] != B):
        raise ValueError(f"{op}: block_table must be ({B}, pages); got {tuple(block_table.shape)}")
    if block_table is not None and (S < 16 or S & (S - 1)):
        raise ValueError(f"{op}: k_cache's page must be a power of two from 16 on; got {S}")


def _scales(
    q: Tensor, k_scale: float | Tensor | None, v_scale: float | Tensor | None, H_kv: int
) -> Tensor | None:
    """Both scales as one (2, H_kv) float32 tensor, or None."""
    if k_scale is None and v_scale is None:
        return None
    given = (1.0 if s is None else s for s in (k_scale, v_scale))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.stack(
        [torch.as_tensor(s, dtype=wide, device=q.device).reshape(-1).expand(H_kv) for s in given]
    )


def reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the whole cache in eager PyTorch, under a mask of what is filled."""
    _check(q, k_cache, v_cache, cache_seqlens, block_table, num_splits)
    B, S_q = q.shape[:2]
    op = "flash_attention_decode"
    flash.check_options(op, q, window_size, softcap, alibi_slopes, sinks, 0.0, B)
    k, v = k_cache, v_cache
    readable = torch.ones((), dtype=torch.bool, device=q.device)
    if block_table is not None:
        table = block_table.long()
        readable = ((table >= 0) & (table < k.shape[0])).repeat_interleave(k.shape[1], 1)
        table = table.clamp(0, max(k.shape[0] - 1, 0))
        k, v = (x[table].flatten(1, 2) for x in (k, v))
    length = cache_seqlens.clamp(0, k.shape[1])[:, None, None]
    cols = torch.arange(k.shape[1], device=q.device)
    readable = (readable & (cols < length[:, 0])).expand(B, -1)
    k, v = (x.to(q.dtype).masked_fill(~readable[:, :, None, None], 0.0) for x in (k, v))
    scales = _scales(q, k_scale, v_scale, k.shape[2])
    if scales is not None:
        k, v = ((x * s[:, None]).to(q.dtype) for x, s in zip((k, v), scales, strict=True))
    standing = torch.arange(S_q, device=q.device)[:, None] + (length - S_q)
    seen = readable[:, None].expand(B, S_q, -1)
    left, right = flash.window_band(causal, window_size, 0)
    if left is not None:
        seen = seen & (cols >= standing + left)
    if right is not None:
        seen = seen & (cols <= standing + right)
    slopes = flash.as_slopes(alibi_slopes)
    ramp = None
    if slopes is not None:
        ramp = slopes[:, :, None, None] * -(standing - cols).abs()[:, None]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    o, lse = weigh(q, k, v, sinks, None, ramp, None, seen[:, None], scale, softcap, 0.0)
    return (o, lse) if return_lse else o


def _eager(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    num_splits: int = 0,
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same from PyTorch's fused op where that needs no mask: sequences of one length.

    Only on a CPU are lengths free to read.
    """
    _check(q, k_cache, v_cache, cache_seqlens, block_table, num_splits)
    S_q, lengths = q.shape[1], [0]
    readable = q.device.type == "cpu" and not torch.compiler.is_compiling() and q.shape[0] > 0
    if readable and block_table is None and not options and q.dtype == k_cache.dtype:
        lengths = cache_seqlens.tolist()
    S = lengths[0]
    one = S_q == 1 and min(window_size) >= -1  # it stands at the end, and sees all or the last few
    all_there_is = S_q == S and window_size == (-1, -1)
    even = 0 < S <= k_cache.shape[1] and lengths.count(S) == len(lengths)
    if not (even and (one or all_there_is)):
        return reference(
            q, k_cache, v_cache, cache_seqlens=cache_seqlens, block_table=block_table,
            causal=causal, softmax_scale=softmax_scale, window_size=window_size,
            num_splits=num_splits, **options,
        )  # fmt: skip
    begin = 0 if window_size[0] == -1 else max(S - 1 - window_size[0], 0)
    k, v = (x[:, begin:S].transpose(1, 2) for x in (k_cache, v_cache))
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, is_causal=causal and S_q > 1, scale=softmax_scale,
        enable_gqa=q.shape[2] != k.shape[1],
    )  # fmt: skip
    return o.transpose(1, 2)


def _uncovered(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens, **options
) -> str | None:
    table = options.get("block_table")
    _check(q, k_cache, v_cache, cache_seqlens, table, options.get("num_splits", 0))
    e4m3 = k_cache.dtype == torch.float8_e4m3fn
    if e4m3 and q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 9):
        return "float8_e4m3fn wants a GPU of capability 8.9 or more"
    cache = k_cache.new_empty(0, q.shape[3], dtype=q.dtype)  # its own dtype is checked above
    return flash.kernel_refuses({"q": q, "k_cache": cache, "v_cache": v_cache[:0].to(q.dtype)})


@dispatched(eager=_eager, uncovered=_uncovered)
def flash_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens over a key-value cache that already holds them.

    Args:
        q: (B, S_q, H, D) float32, float16 or bfloat16: the last S_q tokens of each sequence.
        k_cache: (B, S, H_kv, D), or pages (n, page, H_kv, D) with ``block_table``; the dtype of q,
            int8 or float8.
        v_cache: The same, D_v in place of D.
        cache_seqlens: (B,) int32 or int64: tokens in the cache, the new ones among them. What lies
            beyond is never read.
        block_table: (B, pages a sequence) int32: the pages of each sequence in order. Entries past
            its length may hold anything; a page number out of range hides its tokens.
        causal: Query i sees key j where j <= i + cache_seqlens - S_q.
        softmax_scale: Factor of the scores; default 1 / sqrt(D).
        window_size: As ``flash_attention``.
        softcap: As ``flash_attention``.
        alibi_slopes: (H,) or (B, H).
        sinks: (H,) logits of the denominator.
        k_scale: Factor of an int8 or float8 cache, a number or (H_kv,); default 1.
        v_scale: The same of the values.
        num_splits: Shares of the keys that run side by side; 0 chooses by the GPU's size. With 1 a
            sequence's result does not depend on the rest of the batch.
        return_lse: Give the log-sum-exp of the scores too.

    Returns:
        o (B, S_q, H, D_v) in the dtype of q, and with ``return_lse`` lse (B, H, S_q) float32.
        No gradients.

    Raises:
        ValueError: Shapes, dtypes or options that do not fit.
    """
    flash.check_options(
        "flash_attention_decode", q, window_size, softcap, alibi_slopes, sinks, 0.0, q.shape[0]
    )
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    q, scale = flash.positive(q.detach(), scale)
    o, lse = decode(
        q, k_cache.detach(), v_cache.detach(), cache_seqlens.contiguous(),
        None if block_table is None else block_table.contiguous(),
        flash.as_slopes(alibi_slopes), None if sinks is None else sinks.detach().contiguous(),
        _scales(q, k_scale, v_scale, k_cache.shape[2]),
        scale, *flash.window_band(causal, window_size, 0), float(softcap), num_splits,
    )  # fmt: skip
    return (o, lse) if return_lse else o


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype,
    device: torch.device,
    lengths: tuple[int, ...],
    S_q: int,
    S: int,
    H: int,
    H_kv: int,
    D: int,
    page: int = 0,
    **options,
) -> Inputs:
    B = len(lengths)
    pages = -(-S // page) if page else 0
    shape = (B * pages + 1, page, H_kv, D) if page else (B, S, H_kv, D)
    table = {}
    if page:
        order = torch.randperm(B * pages, device=device, dtype=torch.int32).view(B, pages)
        table = {"block_table": order}
    return (
        {
            "q": torch.randn(B, S_q, H, D, dtype=dtype, device=device),
            "k_cache": torch.randn(shape, dtype=dtype, device=device),
            "v_cache": torch.randn(shape, dtype=dtype, device=device),
            "cache_seqlens": torch.tensor(lengths, dtype=torch.int32, device=device),
        }
        | table
        | options
    )


def work(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, **_: object
) -> tuple[int, int]:
    """Bytes: the filled part of the cache, q and o. FLOPs: two products over it."""
    tokens = int(cache_seqlens.sum())
    S_q, H, D = q.shape[1:]
    H_kv, D_v = v_cache.shape[2:]
    token_bytes = H_kv * (D * k_cache.itemsize + D_v * v_cache.itemsize)
    return tokens * token_bytes + 2 * q.nbytes, 2 * tokens * S_q * H * (D + D_v)


OP = Op(
    fused=flash_attention_decode,
    reference=reference,
    example=_example,
    sizes=(
        {"lengths": (1,), "S_q": 1, "S": 1, "H": 1, "H_kv": 1, "D": 1},
        {"lengths": (100, 37), "S_q": 1, "S": 128, "H": 4, "H_kv": 2, "D": 16, "num_splits": 3,
         "causal": False},
        {"lengths": (50, 0, 3), "S_q": 3, "S": 64, "H": 2, "H_kv": 1, "D": 24, "page": 16,
         "return_lse": True},
    ),
    bench_sizes=tuple(
        {"lengths": (S,) * B, "S_q": 1, "S": S, "H": 32, "H_kv": 8, "D": 128}
        for B in (1, 8, 64)
        for S in (1024, 8192, 131072)
        if B * S <= 2**20
    ),
    work=work,
)  # fmt: skip
