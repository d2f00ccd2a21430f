"""``F.scaled_dot_product_attention`` over the same kernels: PyTorch's layout and rules."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._dispatch import dispatched
from .._op import Inputs, Op
from . import flash


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention in eager PyTorch."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


# --- public -------------------------------------------------------------------------------------


def _uncovered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str | None:
    if not 0.0 <= dropout_p < 1.0:
        return f"dropout_p is {dropout_p}"
    if min(query.dim(), key.dim(), value.dim()) < 2:
        return f"query has {query.dim()} dimensions, key {key.dim()}, value {value.dim()}"
    q, k, v = (_headed(x) for x in (query, key, value))
    if k.shape[-1] != q.shape[-1] or v.shape[-2] != k.shape[-2]:
        return f"shapes {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)} do not fit"
    H, H_kv = q.shape[-3], k.shape[-3]
    if v.shape[-3] != H_kv or (H_kv != H and not (enable_gqa and H_kv and H % H_kv == 0)):
        return f"query has {H} heads, key {H_kv}, value {v.shape[-3]}, enable_gqa is {enable_gqa}"
    batches = {tuple(x.shape[:-3]) for x in (q, k, v)}
    try:
        batch = torch.broadcast_shapes(*batches)
    except RuntimeError:
        return f"batch dimensions {sorted(batches)} do not broadcast"
    if attn_mask is not None:
        if is_causal:
            return "attn_mask and is_causal are both given"
        if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
            return f"attn_mask is {attn_mask.dtype} and query {query.dtype}"
        full = (*batch, H, q.shape[-2], k.shape[-2])
        if attn_mask.dim() > len(full) or any(
            n not in (1, m) for n, m in zip(attn_mask.shape[::-1], full[::-1], strict=False)
        ):
            return f"attn_mask {tuple(attn_mask.shape)} does not broadcast to {full}"
    return flash.kernel_refuses({"query": query, "key": key, "value": value}, (attn_mask,))


def _headed(x: Tensor) -> Tensor:
    """``x`` (..., S, D) with a dimension of heads."""
    return x if x.dim() > 2 else x.unsqueeze(0)


def _as_bias(mask: Tensor | None, batch: torch.Size) -> Tensor | None:
    """The mask with one batch dimension and a dimension of heads, each 1 or whole."""
    if mask is None:
        return None
    if mask.dim() > 3 and len(batch) != 1:
        own = mask.shape[:-3]
        mask = mask.expand(*batch, *mask.shape[-3:]) if own.numel() > 1 else mask
        mask = mask.reshape(-1, *mask.shape[-3:])
    return mask[(None,) * (4 - mask.dim())]


@dispatched(eager=F.scaled_dot_product_attention, uncovered=_uncovered)
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of query over key and value; drop-in for ``F.scaled_dot_product_attention``.

    Args:
        query: (..., H, S_q, D) float32, float16 or bfloat16; any strides.
        key: (..., H, S_k, D); with ``enable_gqa`` (..., H_kv, S_k, D), H a multiple of H_kv.
        value: (..., H, S_k, D_v), heads as key's. Batch dimensions broadcast.
        attn_mask: Broadcasts to (..., H, S_q, S_k): a bool keeps the keys that are True, a float is
            added to the scores and may want a gradient. Not together with ``is_causal``.
        dropout_p: Probability that a weight is dropped; the seed comes from PyTorch's generator.
        is_causal: Query i sees key j where j <= i: the first rows line up.
        scale: Factor of the scores; default 1 / sqrt(D).
        enable_gqa: Query head h reads KV head h // (H / H_kv).

    Returns:
        (..., H, S_q, D_v) in the dtype of query, laid out (..., S_q, H, D_v). A row that sees no
        key is 0.

    Raises:
        RuntimeError: What ``F.scaled_dot_product_attention`` raises, for inputs that do not fit.
    """
    q, k, v = (_headed(x) for x in (query, key, value))
    batch = q.shape[:-3]
    if k.shape[:-3] != batch or v.shape[:-3] != batch:
        batch = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
        q, k, v = (x.expand(*batch, *x.shape[-3:]) for x in (q, k, v))
    if len(batch) != 1:
        q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k, v = flash.autocast(q, k, v)
    q, scale = flash.positive(q, q.shape[-1] ** -0.5 if scale is None else float(scale))
    seed = flash.as_seed(None, dropout_p, q.device)
    o, *_ = flash.attend(
        q, k, v, None, _as_bias(attn_mask, batch), None, seed, None, None,
        scale, None, 0 if is_causal else None, 0.0, float(dropout_p),
    )  # fmt: skip
    o = o.transpose(1, 2)
    if len(batch) != 1:
        o = o.reshape(*batch, *o.shape[1:])
    return o if max(query.dim(), key.dim(), value.dim()) > 2 else o.squeeze(0)


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype,
    device: torch.device,
    B: int,
    S_q: int,
    S_k: int,
    H: int,
    H_kv: int,
    D: int,
    **options,
) -> Inputs:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_()

    if H_kv != H:
        options["enable_gqa"] = True
    return {
        "query": leaf(B, H, S_q, D),
        "key": leaf(B, H_kv, S_k, D),
        "value": leaf(B, H_kv, S_k, D),
    } | options


OP = Op(
    fused=scaled_dot_product_attention,
    reference=reference,
    example=_example,
    sizes=(
        {"B": 1, "S_q": 1, "S_k": 1, "H": 1, "H_kv": 1, "D": 1},
        {"B": 1, "S_q": 37, "S_k": 53, "H": 2, "H_kv": 2, "D": 16, "is_causal": True},
        {"B": 2, "S_q": 33, "S_k": 19, "H": 2, "H_kv": 1, "D": 24, "is_causal": True},
    ),
    bench_sizes=tuple(
        {
            "B": 2**14 // S,
            "S_q": S,
            "S_k": S,
            "H": 2048 // D,
            "H_kv": 2048 // D,
            "D": D,
            "is_causal": c,
        }
        for D in (64, 128)
        for S in (512, 2048, 8192)
        for c in (False, True)
    ),
    work=lambda query, key, value, is_causal=False, **_: flash.work(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), causal=is_causal
    ),
)
