"""Flash attention over ragged batches: sequences laid end to end, with no padding between them.

The same kernels; a program finds its sequence by a binary search in ``cu_seqlens``, so the host
never asks the GPU how long the longest one is.
"""

import torch
from torch import Tensor

from .._dispatch import dispatched
from .._op import Inputs, Op
from . import flash
from .eager import attend_ragged_eager, attend_ragged_opaque


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    """Raises where the tensors are not a ragged batch."""
    op = "flash_attention_varlen"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 3:
            raise ValueError(f"{op}: {name} must be (total, H, D); got {tuple(t.shape)}")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"{op}: k must have q's head dimension, {q.shape[2]}; got {k.shape[2]}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"{op}: v must be {(*k.shape[:2], 'D_v')}, as k; got {tuple(v.shape)}")
    flash.check_heads_and_dtypes(op, q, k, v)
    for name, t in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if t.dim() != 1 or t.numel() < 1 or t.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{op}: {name} must be (B + 1,) int32 or int64; got {tuple(t.shape)} {t.dtype}"
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{op}: cu_seqlens_k must have as many entries as cu_seqlens_q, "
            f"{cu_seqlens_q.numel()}; got {cu_seqlens_k.numel()}"
        )


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    softmax_scale: float | None,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    dropout_seed: int | Tensor | None,
) -> tuple:
    """What the operator takes, in its order; q, k and v as a batch of one."""
    flash.check_options(
        "flash_attention_varlen", q, window_size, softcap, alibi_slopes, sinks, dropout_p,
        cu_seqlens_q.numel() - 1,
    )  # fmt: skip
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    q, scale = flash.positive(q, scale)
    return (
        q[None], k[None], v[None], sinks, None, flash.as_slopes(alibi_slopes),
        flash.as_seed(dropout_seed, dropout_p, q.device),
        cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(),
        scale, *flash.window_band(causal, window_size, 0), float(softcap), float(dropout_p),
    )  # fmt: skip


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each sequence in eager PyTorch, one by one."""
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    loop = attend_ragged_opaque if torch.compiler.is_compiling() else attend_ragged_eager
    o, lse = loop(
        *_arguments(
            q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale, window_size, softcap,
            alibi_slopes, sinks, dropout_p, dropout_seed,
        )
    )  # fmt: skip
    return (o[0], lse[0]) if return_lse else o[0]


# --- public -------------------------------------------------------------------------------------


def _uncovered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    **_: object,
) -> str | None:
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        return "alibi_slopes wants a gradient"
    return flash.kernel_refuses({"q": q, "k": k, "v": v}, (sinks,))


@dispatched(eager=reference, uncovered=_uncovered)
def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``flash_attention`` of B sequences of any lengths, laid end to end.

    Args:
        q: (total_q, H, D) float32, float16 or bfloat16, D as ``flash_attention``; any strides.
        k: (total_k, H_kv, D), the dtype of q; H is a multiple of H_kv.
        v: (total_k, H_kv, D_v), the dtype of q.
        cu_seqlens_q: (B + 1,) int32 or int64, starting at 0: sequence b has the rows
            cu_seqlens_q[b] to cu_seqlens_q[b + 1]. Sequences may be empty.
        cu_seqlens_k: (B + 1,), the same of k and v.
        max_seqlen_q: Not needed, and taken for the sake of callers that have it.
        max_seqlen_k: The same.
        causal: As ``flash_attention``, in each sequence: the last rows line up.
        softmax_scale: Factor of the scores; default 1 / sqrt(D).
        window_size: As ``flash_attention``.
        softcap: As ``flash_attention``.
        alibi_slopes: (H,) or (B, H).
        sinks: (H,) learned logits of the denominator.
        dropout_p: Probability that a weight is dropped, keyed by (seed, b, h, i, j).
        dropout_seed: An int or an int64 tensor; default drawn from PyTorch's generator.
        deterministic: The backward is the same to the bit from run to run either way.
        return_lse: Give the log-sum-exp of the scores too.

    Returns:
        o (total_q, H, D_v), and with ``return_lse`` lse (H, total_q) float32. Rows past the last
        sequence give o = 0, lse = -inf and gradients of 0.

    Raises:
        ValueError: Shapes, dtypes or options that do not fit.
    """
    q, k, v = flash.autocast(q, k, v)
    o, lse, _ = flash.attend(
        *_arguments(
            q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale, window_size, softcap,
            alibi_slopes, sinks, dropout_p, dropout_seed,
        )
    )  # fmt: skip
    return (o[0], lse[0]) if return_lse else o[0]


# --- declaration --------------------------------------------------------------------------------


def _example(
    dtype: torch.dtype,
    device: torch.device,
    lengths_q: tuple[int, ...],
    lengths_k: tuple[int, ...],
    H: int,
    H_kv: int,
    D: int,
    **options,
) -> Inputs:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_()

    def ends(lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor((0, *lengths), device=device).cumsum(0, dtype=torch.int32)

    return {
        "q": leaf(sum(lengths_q), H, D),
        "k": leaf(sum(lengths_k), H_kv, D),
        "v": leaf(sum(lengths_k), H_kv, D),
        "cu_seqlens_q": ends(lengths_q),
        "cu_seqlens_k": ends(lengths_k),
    } | options


def work(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    **_: object,
) -> tuple[int, int]:
    """Bytes: q, k, v and o once. FLOPs: those of each sequence."""

    def one(x: Tensor, S: int) -> Tensor:
        return torch.empty(1, S, *x.shape[1:], device="meta")

    flops = 0
    for S_q, S_k in zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True):
        flops += flash.work(one(q, S_q), one(k, S_k), one(v, S_k), causal=causal)[1]
    return q.nbytes + k.nbytes + v.nbytes + q.nbytes // q.shape[2] * v.shape[2], flops


OP = Op(
    fused=flash_attention_varlen,
    reference=reference,
    example=_example,
    sizes=(
        {"lengths_q": (1,), "lengths_k": (1,), "H": 1, "H_kv": 1, "D": 1},
        {
            "lengths_q": (5, 0, 33, 40),
            "lengths_k": (7, 3, 50, 33),
            "H": 2,
            "H_kv": 1,
            "D": 16,
            "causal": True,
        },
        {
            "lengths_q": (64, 1, 17),
            "lengths_k": (64, 0, 17),
            "H": 1,
            "H_kv": 1,
            "D": 24,
            "return_lse": True,
        },
    ),
    bench_sizes=tuple(
        {
            "lengths_q": (S,) * (2**14 // S),
            "lengths_k": (S,) * (2**14 // S),
            "H": 16,
            "H_kv": 16,
            "D": 128,
            "causal": True,
        }
        for S in (512, 2048, 8192)
    ),
    work=work,
)
