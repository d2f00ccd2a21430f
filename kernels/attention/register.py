"""fastlm's kernels under PyTorch's own name: an implementation of its flash attention operators.

PyTorch keeps a registry of such implementations (torch >= 2.11); the user activates one with
``torch.nn.attention.activate_flash_attention_impl("FASTLM")``, and every call that PyTorch sends to
flash attention, SDPA's and ``varlen_attn``'s, then runs these kernels. Which calls those are is
PyTorch's choice: with cuDNN first in line, ask for ``sdpa_kernel(SDPBackend.FLASH_ATTENTION)``.
"""

import torch
from torch import Tensor

from . import flash

_Scale = float | None


def register(name: str = "FASTLM") -> None:
    """Lists fastlm among PyTorch's flash attention implementations; activates nothing.

    Args:
        name: What ``torch.nn.attention.activate_flash_attention_impl`` will call it.

    Raises:
        ValueError: This PyTorch has no such registry.
    """
    registry = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if registry is None:
        raise ValueError(
            "register: PyTorch must have torch.nn.attention.register_flash_attention_impl; "
            f"got version {torch.__version__}"
        )
    registry(name, register_fn=Activated)


class Activated:
    """While it lives, PyTorch's flash attention operators run fastlm's kernels on the GPU."""

    def __init__(self) -> None:
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL", "CUDA")
        for operator, implementation in IMPLEMENTATIONS.items():
            self._library.impl(operator, implementation, "CUDA")

    def remove(self) -> None:
        """Gives the operators back to PyTorch."""
        self._library = None


def _limit(size: int | None) -> int:
    return -1 if size is None else size


def _seed_of(rng_state: Tensor, dropout_p: float) -> Tensor | None:
    return rng_state.view(torch.int64)[:1] if dropout_p > 0.0 else None


def _refuse_cache_options(**options: object) -> None:
    for option, value in options.items():
        if value is not None and value is not False:
            raise RuntimeError(
                f"fastlm: {option} has no kernel under PyTorch's operator; "
                "fastlm.kernels.flash_attention_decode takes caches"
            )


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: _Scale,
    window: tuple[int, int],
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse and the state that holds the dropout seed; (B, S, H, D) or ragged (T, H, D)."""
    ragged = cum_seq_q is not None
    rng_state = torch.zeros(2, dtype=torch.int64, device=query.device)
    seed = None
    if dropout_p > 0.0:
        rng_state[:1] = flash.fresh_seed(query.device)
        seed = rng_state[:1].clone()
    q, k, v = (x[None] if ragged else x for x in (query, key, value))
    q, positive = flash.positive(q, query.shape[-1] ** -0.5 if scale is None else scale)
    shift = 0 if ragged else k.shape[1] - q.shape[1]
    o, lse, _ = flash.attend(
        q, k, v, None, None, flash.as_slopes(slopes), seed, cum_seq_q, cum_seq_k,
        positive, *flash.window_band(is_causal, window, shift), 0.0, dropout_p,
    )  # fmt: skip
    rng_state = rng_state.view(torch.uint64)
    return (o[0], lse[0], rng_state) if ragged else (o, lse, rng_state)


def _run_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    scale: _Scale,
    window: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    ragged = cum_seq_q is not None
    do, q, k, v, o = (x[None] if ragged else x for x in (grad, query, key, value, out))
    given = query.shape[-1] ** -0.5 if scale is None else scale
    q, positive = flash.positive(q, given)
    shift = 0 if ragged else k.shape[1] - q.shape[1]
    dq, dk, dv, _, _ = flash.backward(
        do, None, o, lse[None] if ragged else lse, lse.new_empty(0), q, k, v, None, None, None,
        _seed_of(rng_state, dropout_p), cum_seq_q, cum_seq_k,
        positive, *flash.window_band(is_causal, window, shift), 0.0, dropout_p,
        [True, True, True, False, False],
    )  # fmt: skip
    if given <= 0:
        dq = dq * (-1 if given < 0 else 0)
    return (dq[0], dk[0], dv[0]) if ragged else (dq, dk, dv)


def _flash_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask,
    *, scale=None, window_size_left=None, window_size_right=None, seqused_k=None,
    alibi_slopes=None, block_table=None, num_splits=None,
):  # fmt: skip
    _refuse_cache_options(
        seqused_k=seqused_k, block_table=block_table, debug_mask=return_debug_mask
    )
    window = (_limit(window_size_left), _limit(window_size_right))
    o, lse, rng_state = _run(
        query, key, value, cum_seq_q, cum_seq_k, dropout_p, is_causal, scale, window, alibi_slopes
    )
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    return o, lse, rng_state, unused, query.new_empty(0)


def _flash_forward_into(out, query, key, value, *rest, **options):
    o, lse, *_ = _flash_forward(query, key, value, *rest, **options)
    out.copy_(o)
    return lse


def _flash_backward(
    grad, query, key, value, out, lse, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    window = (_limit(window_size_left), _limit(window_size_right))
    return _run_backward(
        grad, query, key, value, out, lse, cum_seq_q, cum_seq_k,
        dropout_p, is_causal, rng_state, scale, window,
    )  # fmt: skip


def _sdpa_forward(
    query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
):
    _refuse_cache_options(return_debug_mask=return_debug_mask)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    o, lse, rng_state = _run(q, k, v, None, None, dropout_p, is_causal, scale, (-1, -1), None)
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    sizes = query.shape[2], key.shape[2]
    return o.transpose(1, 2), lse, None, None, *sizes, rng_state, unused, query.new_empty(0)


def _sdpa_backward(
    grad, query, key, value, out, lse, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    rng_state, unused, *, scale=None,
):  # fmt: skip
    do, q, k, v, o = (x.transpose(1, 2) for x in (grad, query, key, value, out))
    grads = _run_backward(
        do, q, k, v, o, lse, None, None, dropout_p, is_causal, rng_state, scale, (-1, -1)
    )
    return tuple(g.transpose(1, 2) for g in grads)


IMPLEMENTATIONS = {
    "_flash_attention_forward": _flash_forward,
    "_flash_attention_forward_no_dropout_inplace": _flash_forward_into,
    "_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_flash_attention": _sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
}
