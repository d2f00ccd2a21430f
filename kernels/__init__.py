"""Fused Triton ops with PyTorch's signatures. ``OPS`` lists each beside its eager reference."""

from . import _dispatch, _interpreter
from . import adamw as _adamw
from . import layer_norm as _layer_norm
from ._dispatch import backend, explain
from ._op import Op
from .adamw import Adam, AdamW, adamw_step
from .attention import decode as _decode
from .attention import flash as _flash
from .attention import (
    flash_attention,
    flash_attention_decode,
    flash_attention_varlen,
    merge_attention,
    register,
    scaled_dot_product_attention,
)
from .attention import sdpa as _sdpa
from .attention import varlen as _varlen
from .layer_norm import LayerNorm, layer_norm

if _dispatch._cpu_runner == "interpreter":
    _interpreter.install()

OPS = {
    module.OP.name: module.OP for module in (_layer_norm, _flash, _sdpa, _varlen, _decode, _adamw)
}

__all__ = [
    "OPS",
    "Adam",
    "AdamW",
    "LayerNorm",
    "Op",
    "adamw_step",
    "backend",
    "explain",
    "flash_attention",
    "flash_attention_decode",
    "flash_attention_varlen",
    "layer_norm",
    "merge_attention",
    "register",
    "scaled_dot_product_attention",
]
