"""Fused Triton ops with PyTorch's signatures. ``OPS`` lists each beside its eager reference."""

from . import _dispatch, _interpreter
from . import adamw as _adamw
from . import layer_norm as _layer_norm
from ._dispatch import backend, explain
from ._op import Op
from .adamw import Adam, AdamW, adamw_step
from .layer_norm import LayerNorm, layer_norm

if _dispatch._cpu_runner == "interpreter":
    _interpreter.install()

OPS = {module.OP.name: module.OP for module in (_layer_norm, _adamw)}

__all__ = [
    "OPS",
    "Adam",
    "AdamW",
    "LayerNorm",
    "Op",
    "adamw_step",
    "backend",
    "explain",
    "layer_norm",
]
