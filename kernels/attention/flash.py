r"""Flash attention (Dao 2023, https://arxiv.org/abs/2307.08691): exact, without the S x S matrix.

For each batch and head, with q (S_q, D) and k, v (S_k, D) of KV head h // (H / H_kv):

    s = softmax_scale q k^T, keys outside the mask at -inf        lse_i = log sum_j e^(s_ij)
    o = e^(s - lse) v

Backward, with p = e^(s - lse), delta = sum_d do o - dlse, ds = p (do v^T - delta):

    dv = p^T do        dk = softmax_scale ds^T q        dq = softmax_scale ds k

Cost: 4 B H S_q S_k D FLOPs forward, 14 backward (7 products), half of each when causal: bound by
the tensor cores. Memory: q, k, v, o and 4 bytes a row of lse; nothing grows with S_q S_k.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch import dispatched
from .._op import Inputs, Op
from .._register import eager_gradients, torch_op
from . import backward as _backward_kernels
from . import forward as _forward_kernels

Band = tuple[int | None, int | None]


def banded(q: Tensor, k: Tensor, v: Tensor, scale: float, band: Band) -> tuple[Tensor, Tensor]:
    """Eager attention over keys ``left <= j - i <= right``: o in q's dtype and lse.

    The steps and roundings of textbook code, but a row that sees no key gives 0, not NaN.
    """
    S_q, S_k, group = q.shape[1], k.shape[1], q.shape[2] // max(k.shape[2], 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if group != 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * scale
    diagonal = torch.arange(S_k, device=q.device) - torch.arange(S_q, device=q.device)[:, None]
    left, right = band
    seen = torch.ones_like(diagonal, dtype=torch.bool)
    if left is not None:
        seen = seen & (diagonal >= left)
    if right is not None:
        seen = seen & (diagonal <= right)
    empty = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen & ~empty, float("-inf"))
    p = scores.softmax(-1).masked_fill(~seen, 0.0)
    wide = scores.float() if scores.dtype.itemsize == 2 else scores
    lse = wide.logsumexp(-1).masked_fill(empty[:, 0], float("-inf"))
    return (p @ v).transpose(1, 2), lse


# --- launch -------------------------------------------------------------------------------------

_backward = torch_op("flash_attention_backward", fake=_backward_kernels.backward_fake)(
    _backward_kernels.backward
)


def _save(ctx, inputs, output):
    q, k, v, ctx.scale, ctx.left, ctx.right = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx, do, dlse):
    q, k, v, o, lse = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True

        def eager(q, k, v):
            return banded(q, k, v, ctx.scale, (ctx.left, ctx.right))

        return *eager_gradients(eager, (q, k, v), (do, dlse)), None, None, None
    if do is None:
        do = torch.zeros_like(o)
    wants_dq, wants_dk, wants_dv = ctx.needs_input_grad[:3]
    wanted = [wants_dq, wants_dk or wants_dv]
    dq, dk, dv = _backward(do, dlse, q, k, v, o, lse, ctx.scale, ctx.left, ctx.right, wanted)
    return (
        dq if wants_dq else None,
        dk if wants_dk else None,
        dv if wants_dv else None,
        None,
        None,
        None,
    )


attend = torch_op(
    "flash_attention", fake=_forward_kernels.forward_fake, setup_context=_save, backward=_gradients
)(_forward_kernels.forward)


# --- public -------------------------------------------------------------------------------------

MAX_HEAD_DIM = 256


def kernel_refuses(tensors: dict[str, Tensor]) -> str | None:
    """Why the kernels do not take q, k and v (..., D), or None."""
    q, _, v = tensors.values()
    autocast = torch.is_autocast_enabled(q.device.type)
    for name, t in tensors.items():
        if t.dtype not in OP.dtypes or (t.dtype != q.dtype and not autocast):
            return f"{name} is {t.dtype}" + ("" if t is q else f" and q is {q.dtype}")
        if t.device != q.device:
            return f"{name} is on {t.device} and q on {q.device}"
    for name, t in (("q", q), ("v", v)):
        if not 0 < t.shape[-1] <= MAX_HEAD_DIM:
            return f"{name} has head dimension {t.shape[-1]}, not 1 to {MAX_HEAD_DIM}"
    if v.shape[-1] != q.shape[-1]:
        return f"v has head dimension {v.shape[-1]} and q {q.shape[-1]}"
    return None


def attend_scaled(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, band: Band
) -> tuple[Tensor, Tensor]:
    """The kernels with PyTorch's rules for autocast and scale: o (B, S_q, H, D), and lse."""
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale <= 0:  # the running maximum of scores wants a positive factor
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    return attend(q, k, v, scale, *band)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises where q, k and v are not attention's inputs."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise ValueError(f"flash_attention: {name} must be (B, S, H, D); got {tuple(t.shape)}")
    B, _, H, D = q.shape
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(
            f"flash_attention: k must be ({B}, S_k, H_kv, {D}), as q; got {tuple(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"flash_attention: v must be {(*k.shape[:3], 'D_v')}, as k; got {tuple(v.shape)}"
        )
    if k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(
            f"flash_attention: k's number of heads must divide q's, {H}; got {k.shape[2]}"
        )
    if (k.dtype != q.dtype or v.dtype != q.dtype) and not torch.is_autocast_enabled(q.device.type):
        raise ValueError(
            f"flash_attention: k and v must have q's dtype, {q.dtype}; got {k.dtype} and {v.dtype}"
        )


def _refuse(**options) -> None:
    """Raises for an option that has no kernel yet."""
    for name, (value, off) in options.items():
        if value is not off and (value != off):
            raise ValueError(
                f"flash_attention: {name} must be {off}; got {value}, not supported yet"
            )


def _check_options(window_size, softcap, alibi_slopes, sinks, bias, dropout_p) -> None:
    _refuse(
        window_size=(tuple(window_size), (-1, -1)),
        softcap=(softcap, 0.0),
        dropout_p=(dropout_p, 0.0),
    )
    for name, value in (("alibi_slopes", alibi_slopes), ("sinks", sinks), ("bias", bias)):
        if value is not None:
            raise ValueError(f"flash_attention: {name} must be None; a tensor is not supported yet")


def _band_of(causal: bool, q: Tensor, k: Tensor) -> Band:
    return None, k.shape[1] - q.shape[1] if causal else None


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in eager PyTorch, scores and all."""
    _check(q, k, v)
    _check_options(window_size, softcap, alibi_slopes, sinks, bias, dropout_p)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    o, lse = banded(q, k, v, scale, _band_of(causal, q, k))
    return (o, lse) if return_lse else o


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same from PyTorch's fused op, where it has the same meaning."""
    plain = not return_lse and (not causal or q.shape[1] == k.shape[1]) and not options
    if not plain:
        options |= {"causal": causal, "softmax_scale": softmax_scale, "return_lse": return_lse}
        return reference(q, k, v, **options)
    _check(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=gqa
    )
    return o.transpose(1, 2)


def _uncovered(q: Tensor, k: Tensor, v: Tensor, **_) -> str | None:
    _check(q, k, v)
    return kernel_refuses({"q": q, "k": k, "v": v})


@dispatched(eager=_eager, uncovered=_uncovered)
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softmax_scale q k^T) v without the S x S matrix, and its gradients.

    Args:
        q: (B, S_q, H, D) float32, float16 or bfloat16, D up to 256; any strides.
        k: (B, S_k, H_kv, D), the dtype of q. H is a multiple of H_kv: query head h reads KV head
            h // (H / H_kv).
        v: (B, S_k, H_kv, D), the dtype of q.
        causal: Query i sees key j where j <= i + S_k - S_q: the last rows line up.
        softmax_scale: Factor of the scores; default 1 / sqrt(D).
        window_size: Not supported yet: (-1, -1).
        softcap: Not supported yet: 0.
        alibi_slopes: Not supported yet: None.
        sinks: Not supported yet: None.
        bias: Not supported yet: None.
        dropout_p: Not supported yet: 0.
        dropout_seed: Of no effect without dropout.
        deterministic: The backward is the same to the bit from run to run either way.
        return_lse: Give the log-sum-exp of the scores too.

    Returns:
        o (B, S_q, H, D) in the dtype of q, the autocast dtype under autocast; with
        ``return_lse``, also lse (B, H, S_q) float32, natural log, differentiable. A row that sees
        no key gives o = 0, lse = -inf and gradients of 0.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or an option that is not supported.
    """
    _check_options(window_size, softcap, alibi_slopes, sinks, bias, dropout_p)
    o, lse = attend_scaled(q, k, v, softmax_scale, _band_of(causal, q, k))
    return (o, lse) if return_lse else o


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

    return {
        "q": leaf(B, S_q, H, D),
        "k": leaf(B, S_k, H_kv, D),
        "v": leaf(B, S_k, H_kv, D),
    } | options


def work(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, **_: object) -> tuple[int, int]:
    """Bytes: q, k, v and o once. FLOPs: two products over the scores that are seen."""
    B, S_q, H, D = q.shape
    S_k = k.shape[1]
    scores = S_q * S_k
    if causal:  # rows see S_k - S_q + 1 .. S_k keys
        n = min(S_q, S_k)
        scores = n * (S_k - n) + n * (n + 1) // 2
    return 2 * q.nbytes + k.nbytes + v.nbytes, 4 * B * H * scores * D


OP = Op(
    fused=flash_attention,
    reference=reference,
    example=_example,
    sizes=(
        {"B": 1, "S_q": 1, "S_k": 1, "H": 1, "H_kv": 1, "D": 1},
        {
            "B": 1,
            "S_q": 37,
            "S_k": 53,
            "H": 2,
            "H_kv": 1,
            "D": 16,
            "causal": True,
            "return_lse": True,
        },
        {"B": 2, "S_q": 48, "S_k": 19, "H": 1, "H_kv": 1, "D": 40, "causal": True},
        {"B": 1, "S_q": 17, "S_k": 64, "H": 4, "H_kv": 2, "D": 80},
        {"B": 1, "S_q": 0, "S_k": 5, "H": 1, "H_kv": 1, "D": 8},
        {"B": 1, "S_q": 3, "S_k": 0, "H": 1, "H_kv": 1, "D": 8, "return_lse": True},
    ),
    bench_sizes=tuple(
        {
            "B": 2**14 // S,
            "S_q": S,
            "S_k": S,
            "H": 2048 // D,
            "H_kv": 2048 // D,
            "D": D,
            "causal": c,
        }
        for D in (64, 128)
        for S in (512, 2048, 8192)
        for c in (False, True)
    ),
    work=work,
)
