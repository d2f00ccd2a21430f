r"""Flash attention (Dao 2023, https://arxiv.org/abs/2307.08691): exact, without the S x S matrix.

For each batch and head, with q (S_q, D) and k, v (S_k, D) of KV head h // (H / H_kv):

    s = softmax_scale q k^T, keys outside the mask at -inf        lse_i = log sum_j e^(s_ij)
    o = e^(s - lse) v

Backward, with p = e^(s - lse), delta = sum_d do o - dlse, ds = p (do v^T - delta):

    dv = p^T do        dk = softmax_scale ds^T q        dq = softmax_scale ds k

Cost: 4 B H S_q S_k D FLOPs forward, 14 backward (7 products), half of each when causal: bound by
the tensor cores. Memory: q, k, v, o and 4 bytes a row of lse, 12 in float32 or beside an additive
bias; nothing grows with S_q S_k.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch import dispatched
from .._op import Inputs, Op
from .._register import eager_gradients, torch_op
from . import forward as _forward
from . import gradients as _gradients
from ._scores import SPARSE_BLOCK
from .eager import attend_eager, attend_ragged_eager, visible

# --- launch -------------------------------------------------------------------------------------

backward = torch_op("flash_attention_backward", fake=_gradients.backward_fake)(_gradients.backward)
_TENSORS = 9  # the op's leading arguments, q to cu_seqlens_k


def _save(ctx, inputs, output):
    *given, block_mask = inputs
    ctx.save_for_backward(*output, block_mask, *given[:_TENSORS])
    ctx.options = given[_TENSORS:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, dlse, _):
    o, lse, peaks, block_mask, *tensors = ctx.saved_tensors
    q, k, v, sinks, bias, slopes, seed, cu_seqlens_q, cu_seqlens_k = tensors
    rest = (None,) * (_TENSORS - 5 + len(ctx.options) + 1)
    if torch.is_grad_enabled():  # create_graph=True
        inputs = (q, k, v, sinks, bias)

        def eager(q, k, v, sinks, bias):
            given = [q, k, v, sinks, bias, slopes, seed]
            if cu_seqlens_q is None:
                return attend_eager(*[*given, *ctx.options, block_mask])
            return attend_ragged_eager(*[*given, cu_seqlens_q, cu_seqlens_k, *ctx.options])

        return *eager_gradients(eager, inputs, (do, dlse)), *rest
    if do is None:
        do = torch.zeros_like(o)
    wanted = list(ctx.needs_input_grad[:5])
    grads = backward(do, dlse, o, lse, peaks, *tensors, *ctx.options, wanted, block_mask)
    return *(g if w else None for g, w in zip(grads, wanted, strict=True)), *rest


attend = torch_op(
    "flash_attention", fake=_forward.forward_fake, setup_context=_save, backward=_differentiate
)(_forward.forward)


# --- public -------------------------------------------------------------------------------------

MAX_HEAD_DIM = 256
MAX_FORWARD_HEAD_DIM = 512  # without gradients, in half precision


def kernel_refuses(
    tensors: dict[str, Tensor], learned: Sequence[Tensor | None] | None = None
) -> str | None:
    """Why the kernels do not take q, k and v (..., D), or None.

    ``learned``: what else may want a gradient, of an op that has wide heads.
    """
    q, _, v = tensors.values()
    autocast = torch.is_autocast_enabled(q.device.type)
    for name, t in tensors.items():
        if t.dtype not in OP.dtypes or (t.dtype != q.dtype and not autocast):
            return f"{name} is {t.dtype}" + ("" if t is q else f" and q is {q.dtype}")
        if t.device != q.device:
            return f"{name} is on {t.device} and q on {q.device}"
    limit = MAX_HEAD_DIM
    if learned is not None and q.dtype.itemsize == 2 and not autocast:
        wanting = [t for t in (*tensors.values(), *learned) if t is not None and t.requires_grad]
        if not (torch.is_grad_enabled() and wanting):
            limit = MAX_FORWARD_HEAD_DIM
    for name, t in (("q", q), ("v", v)):
        if not 0 < t.shape[-1] <= limit:
            return f"{name} has head dimension {t.shape[-1]}, not 1 to {limit}"
    return None


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the dtype that PyTorch's autocast gives attention."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) for t in tensors)


def positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same q and scale with a positive scale: a running maximum wants one."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0, 1.0)


def fresh_seed(device: torch.device) -> Tensor:
    """A dropout seed from PyTorch's generator, which CUDA graphs and checkpointing replay."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device)


def as_seed(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """A dropout seed as one int64 on the device."""
    if dropout_p == 0.0:
        return None
    if seed is None:
        return fresh_seed(device)
    if isinstance(seed, Tensor):
        return seed.to(device, torch.int64).reshape(1)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def check_options(
    op: str,
    q: Tensor,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    B: int,
) -> None:
    """Raises where an option's value has no meaning."""
    H = q.shape[-2]
    if len(window_size) != 2 or min(window_size) < -1:
        raise ValueError(
            f"{op}: window_size must be (left, right), each -1 (no limit) or a number of keys; "
            f"got {window_size}"
        )
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"{op}: softcap must be 0 (none) or positive; got {softcap}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1); got {dropout_p}")
    if alibi_slopes is not None and tuple(alibi_slopes.shape) not in ((H,), (B, H)):
        raise ValueError(
            f"{op}: alibi_slopes must be ({H},) or ({B}, {H}); got {tuple(alibi_slopes.shape)}"
        )
    if sinks is not None and tuple(sinks.shape) != (H,):
        raise ValueError(f"{op}: sinks must be ({H},); got {tuple(sinks.shape)}")


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    block_mask: Tensor | None = None,
) -> None:
    """Raises where q, k, v and the masks are not attention's inputs."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise ValueError(f"flash_attention: {name} must be (B, S, H, D); got {tuple(t.shape)}")
    B, S_q, H, D = q.shape
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(
            f"flash_attention: k must be ({B}, S_k, H_kv, {D}), as q; got {tuple(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"flash_attention: v must be {(*k.shape[:3], 'D_v')}, as k; got {tuple(v.shape)}"
        )
    check_heads_and_dtypes("flash_attention", q, k, v)
    if bias is not None:
        full = (B, H, S_q, k.shape[1])
        fits = bias.dim() <= 4 and all(
            n in (1, m) for n, m in zip(reversed(bias.shape), reversed(full), strict=False)
        )
        if not fits:
            raise ValueError(
                f"flash_attention: bias must broadcast to {full}; got {tuple(bias.shape)}"
            )

    if block_mask is not None:
        tiled = (B, H, -(-S_q // SPARSE_BLOCK), -(-k.shape[1] // SPARSE_BLOCK))
        ones = (1, 1, *tiled[2:])
        fits = block_mask.dim() == 4 and all(
            n in pair
            for n, pair in zip(block_mask.shape, zip(ones, tiled, strict=True), strict=True)
        )
        if not fits or block_mask.dtype != torch.bool:
            raise ValueError(
                f"flash_attention: block_mask must be bool {tiled}, the first two or 1; "
                f"got {block_mask.dtype} {tuple(block_mask.shape)}"
            )


def check_heads_and_dtypes(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises where heads do not group or dtypes differ."""
    H, H_kv = q.shape[-2], k.shape[-2]
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"{op}: k's number of heads must divide q's, {H}; got {H_kv}")
    if (k.dtype != q.dtype or v.dtype != q.dtype) and not torch.is_autocast_enabled(q.device.type):
        raise ValueError(
            f"{op}: k and v must have q's dtype, {q.dtype}; got {k.dtype} and {v.dtype}"
        )


def as_slopes(slopes: Tensor | None) -> Tensor | None:
    """ALiBi slopes as the kernels read them: (1 or B, H) float32 or wider, contiguous."""
    if slopes is None:
        return None
    slopes = slopes if slopes.dim() == 2 else slopes[None]
    return (slopes.float() if slopes.dtype.itemsize < 4 else slopes).contiguous()


def as_bias(bias: Tensor | None) -> Tensor | None:
    """A bias with four dimensions."""
    return None if bias is None else bias[(None,) * (4 - bias.dim())]


def window_band(
    causal: bool, window_size: tuple[int, int], shift: int
) -> tuple[int | None, int | None]:
    """Sides of the band of j - i that a window leaves, ``shift`` on from the main diagonal."""
    left, right = window_size
    if causal:
        right = 0
    return None if left == -1 else shift - left, None if right == -1 else shift + right


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
    dropout_seed: int | Tensor | None = None,
    block_mask: Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in eager PyTorch, scores and all."""
    check(q, k, v, bias, block_mask)
    check_options(
        "flash_attention", q, window_size, softcap, alibi_slopes, sinks, dropout_p, q.shape[0]
    )
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    left, right = window_band(causal, window_size, k.shape[1] - q.shape[1])
    seed = as_seed(dropout_seed, dropout_p, q.device)
    o, lse = attend_eager(
        q, k, v, sinks, as_bias(bias), as_slopes(alibi_slopes), seed,
        scale, left, right, softcap, dropout_p, block_mask,
    )  # fmt: skip
    return (o, lse) if return_lse else o


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool = True,
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same from PyTorch's fused op, where it has the same meaning."""
    asked = [name for name, value in options.items() if value is not None and name != "softcap"]
    if return_lse or asked or options.get("softcap", 0.0) != 0.0:
        return reference(
            q, k, v, causal=causal, softmax_scale=softmax_scale, window_size=window_size,
            dropout_p=dropout_p, return_lse=return_lse, **options,
        )  # fmt: skip
    check(q, k, v)
    check_options("flash_attention", q, window_size, 0.0, None, None, dropout_p, q.shape[0])
    square, mask = q.shape[1] == k.shape[1], None
    if tuple(window_size) != (-1, -1) or (causal and not square):
        band = window_band(causal, window_size, k.shape[1] - q.shape[1])
        mask = visible(q.shape[1], k.shape[1], *band, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p, is_causal=causal and mask is None, scale=softmax_scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return o.transpose(1, 2)


def _uncovered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    block_mask: Tensor | None = None,
    **_: object,
) -> str | None:
    check(q, k, v, bias, block_mask)
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        return "alibi_slopes wants a gradient"
    return kernel_refuses({"q": q, "k": k, "v": v}, (sinks, bias))


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
    dropout_seed: int | Tensor | None = None,
    block_mask: Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softmax_scale q k^T) v without the S x S matrix, and its gradients.

    Rows and keys line up at their ends: with shift = S_k - S_q, query i stands at key i + shift.

    Args:
        q: (B, S_q, H, D) float32, float16 or bfloat16, D up to 256, or to 512 in half precision
            without gradients; any strides.
        k: (B, S_k, H_kv, D), the dtype of q. H is a multiple of H_kv: query head h reads KV head
            h // (H / H_kv).
        v: (B, S_k, H_kv, D_v), the dtype of q, D_v as D.
        causal: Query i sees key j where j <= i + shift.
        softmax_scale: Factor of the scores; default 1 / sqrt(D).
        window_size: (left, right): query i sees i + shift - left <= j <= i + shift + right, both
            ends included; -1 is no limit. W tokens of the past and itself are (W - 1, 0).
        softcap: Scores become softcap tanh(scores / softcap) (Gemma 2); 0 leaves them.
        alibi_slopes: (H,) or (B, H): adds -slope |i + shift - j| (Press et al. 2022,
            https://arxiv.org/abs/2108.12409).
        sinks: (H,) learned logits that join the softmax's denominator alone (Xiao et al. 2023,
            https://arxiv.org/abs/2309.17453); differentiable.
        bias: Added to the scores, broadcast to (B, H, S_q, S_k); differentiable. A bool keeps the
            keys that are True.
        dropout_p: Probability that a weight is dropped, in [0, 1).
        dropout_seed: An int or an int64 tensor; the same seed drops the same (b, h, i, j) whatever
            the tile sizes. Default: drawn from PyTorch's generator.
        block_mask: Bool (B or 1, H or 1, ceil(S_q / 128), ceil(S_k / 128)): blocks of 128 x 128
            scores that are False are hidden and never visited, forward or backward; the other
            masks still hold in the rest. FlexAttention's ``BlockMask.to_dense().bool()`` is one.
        deterministic: The backward is the same to the bit from run to run either way.
        return_lse: Give the log-sum-exp of the scores too.

    Returns:
        o (B, S_q, H, D_v) in the dtype of q, the autocast dtype under autocast; with
        ``return_lse``, also lse (B, H, S_q) float32, natural log, sinks included, differentiable.
        A row that sees no key gives o = 0, lse = -inf (the sink, if there is one) and gradients
        of 0.

    Raises:
        ValueError: Shapes, dtypes or options that do not fit.
    """
    check_options(
        "flash_attention", q, window_size, softcap, alibi_slopes, sinks, dropout_p, q.shape[0]
    )
    q, k, v = autocast(q, k, v)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    q, scale = positive(q, scale)
    left, right = window_band(causal, window_size, k.shape[1] - q.shape[1])
    seed = as_seed(dropout_seed, dropout_p, q.device)
    o, lse, _ = attend(
        q, k, v, sinks, as_bias(bias), as_slopes(alibi_slopes), seed, None, None,
        scale, left, right, float(softcap), float(dropout_p), block_mask,
    )  # fmt: skip
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
    D_v: int | None = None,
    bias: tuple[int, ...] | None = None,
    sinks: bool = False,
    alibi: bool = False,
    **options,
) -> Inputs:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_()

    inputs = {
        "q": leaf(B, S_q, H, D),
        "k": leaf(B, S_k, H_kv, D),
        "v": leaf(B, S_k, H_kv, D_v or D),
    }
    if bias is not None:
        inputs["bias"] = leaf(*bias)
    if sinks:
        inputs["sinks"] = leaf(H)
    if alibi:
        inputs["alibi_slopes"] = torch.rand(H, device=device)
    return inputs | options


def work(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    **_: object,
) -> tuple[int, int]:
    """Bytes: q, k, v and o once. FLOPs: two products over the scores that are seen."""
    B, S_q, H, D = q.shape
    S_k, D_v = v.shape[1], v.shape[3]
    shift = S_k - S_q
    left, right = window_band(causal, window_size, shift)
    scores = 0
    for i in range(S_q):
        low = 0 if left is None else max(0, i + left)
        high = S_k if right is None else min(S_k, i + right + 1)
        scores += max(0, high - low)
    o_bytes = q.nbytes // max(D, 1) * D_v
    return q.nbytes + k.nbytes + v.nbytes + o_bytes, 2 * B * H * scores * (D + D_v)


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
        {"B": 2, "S_q": 48, "S_k": 17, "H": 1, "H_kv": 1, "D": 40, "causal": True},
        {"B": 1, "S_q": 17, "S_k": 64, "H": 4, "H_kv": 2, "D": 80},
        {
            "B": 1,
            "S_q": 34,
            "S_k": 62,
            "H": 2,
            "H_kv": 1,
            "D": 16,
            "D_v": 24,
            "causal": True,
            "window_size": (6, -1),
            "softcap": 3.0,
            "bias": (2, 1, 62),
            "sinks": True,
            "alibi": True,
            "dropout_p": 0.2,
            "dropout_seed": 3,
        },
        {"B": 1, "S_q": 0, "S_k": 5, "H": 1, "H_kv": 1, "D": 8},
        {"B": 1, "S_q": 3, "S_k": 0, "H": 1, "H_kv": 1, "D": 8, "return_lse": True},
    ),
    bench_sizes=(
        *(
            {
                "B": 2**14 // S,
                "S_q": S,
                "S_k": S,
                "H": 2048 // D,
                "H_kv": 2048 // D,
                "D": D,
                "causal": causal,
            }
            for D in (64, 128)
            for S in (512, 2048, 8192)
            for causal in (False, True)
        ),
        {"B": 2, "S_q": 8192, "S_k": 8192, "H": 16, "H_kv": 4, "D": 128, "causal": True},
        {
            "B": 2,
            "S_q": 8192,
            "S_k": 8192,
            "H": 16,
            "H_kv": 16,
            "D": 128,
            "causal": True,
            "window_size": (1023, 0),
        },
    ),
    work=work,
)
