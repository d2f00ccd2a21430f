"""The operations that the model is made of, each as a fused kernel or in eager PyTorch."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Literal

import torch

from fastlm.kernels import OPS
from fastlm.kernels._philox import words_of

Choice = Literal["fused", "eager"]

NAMES = (
    "add_layer_norm",
    "add_rms_norm",
    "dropout",
    "embedding",
    "flash_attention",
    "flash_attention_decode",
    "flash_attention_varlen",
    "geglu",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "relu_squared",
    "rms_norm",
    "rotary_embedding",
    "sample",
    "swiglu",
)


def resolve(ops: Choice | Mapping[str, Choice]) -> SimpleNamespace:
    """A namespace of the functions of ``NAMES``.

    Args:
        ops: ``"fused"`` takes every kernel of ``fastlm.kernels``, which on a CPU is PyTorch's own
            op; ``"eager"`` takes each kernel's reference. A mapping says so op by op; what it
            leaves out is fused.

    Raises:
        ValueError: An unknown op, or neither of the two words.
    """
    choices: Mapping[str, str] = {} if isinstance(ops, str) else ops
    usual = ops if isinstance(ops, str) else "fused"
    for name in choices:
        if name not in NAMES:
            raise ValueError(f"ops must name ops of {', '.join(NAMES)}; got {name!r}")
    return SimpleNamespace(**{name: _chosen(name, choices.get(name, usual)) for name in NAMES})


def _chosen(name: str, how: str) -> Callable[..., Any]:
    if how not in ("fused", "eager"):
        raise ValueError(f"ops must be 'fused' or 'eager' for {name}; got {how!r}")
    if name not in OPS:  # until the op is there
        return _linear_cross_entropy if name == "linear_cross_entropy" else _sample
    return OPS[name].fused if how == "fused" else OPS[name].reference


def _linear_cross_entropy(input, linear_weight, target, *, reduction="mean"):
    return torch.nn.functional.cross_entropy(input @ linear_weight.T, target, reduction=reduction)


def _sample(logits, *, temperature, top_k, top_p, min_p, seed, offset):
    """Gumbel noise of (seed, offset) on what the filters leave of each row."""
    scores = logits.float() / temperature
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        p, order = scores.softmax(-1).sort(descending=True)
        dropped = torch.zeros_like(p, dtype=torch.bool).scatter_(
            1, order, p.cumsum(-1) - p >= top_p
        )
        scores = scores.masked_fill(dropped, -torch.inf)
    if min_p:
        p = scores.softmax(-1)
        scores = scores.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)
    V = logits.shape[-1]
    quads = -(-V // 4)
    counters = offset[:, None] * quads + torch.arange(quads, device=logits.device)
    words = words_of(seed[:, None], counters).flatten(1)[:, :V]
    return (scores - torch.log(-torch.log((words.double() + 0.5) / 2**32))).argmax(-1)
