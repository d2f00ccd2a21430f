"""The operations that the model is made of, each as a fused kernel or in eager PyTorch."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Literal

from fastlm.kernels import OPS

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
    return OPS[name].fused if how == "fused" else OPS[name].reference
