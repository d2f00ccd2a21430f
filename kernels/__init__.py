"""Fused Triton ops with PyTorch's signatures. ``OPS`` lists each beside its eager reference."""

from . import _dispatch, _interpreter, _sources
from . import activations as _activations
from . import add_norm as _add_norm
from . import bias_gelu as _bias_gelu
from . import cross_entropy as _cross_entropy
from . import dropout as _dropout
from . import embedding as _embedding
from . import fp8_linear as _fp8_linear
from . import glu as _glu
from . import group_norm as _group_norm
from . import int4_linear as _int4_linear
from . import int8_linear as _int8_linear
from . import layer_norm as _layer_norm
from . import rms_norm as _rms_norm
from . import rotary as _rotary
from . import sampling as _sampling
from . import softmax as _softmax
from ._dispatch import backend, explain
from ._op import Op
from .activations import GELU, gelu, relu_squared
from .add_norm import add_layer_norm, add_rms_norm
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
from .bias_gelu import bias_gelu
from .cross_entropy import CrossEntropyLoss, cross_entropy
from .dropout import Dropout, dropout
from .embedding import Embedding, embedding
from .fp8_linear import dequantize_fp8, fp8_linear, quantize_fp8
from .glu import geglu, swiglu
from .group_norm import GroupNorm, group_norm
from .int4_linear import Int4Linear, dequantize_int4, int4_linear, quantize_int4
from .int8_linear import Int8Linear, dequantize_int8, int8_linear, quantize_int8
from .layer_norm import LayerNorm, layer_norm
from .linear_cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy
from .linear_cross_entropy import loss as _linear_cross_entropy
from .optim import Adam, AdamW, Lion, Muon, adamw_step, lion_step, muon_step
from .optim import lion as _lion
from .optim import muon as _muon
from .optim import step as _adamw_step
from .patch import PatchReport, patch
from .rms_norm import RMSNorm, rms_norm
from .rotary import rotary_embedding
from .sampling import sample
from .softmax import log_softmax, softmax

_sources.restore()
if _dispatch._cpu_runner == "interpreter":
    _interpreter.install()

OPS = {
    op.name: op
    for op in (
        _flash.OP,
        _varlen.OP,
        _decode.OP,
        _sdpa.OP,
        _layer_norm.OP,
        _rms_norm.OP,
        _group_norm.OP,
        *_add_norm.OPS,
        *_softmax.OPS,
        _cross_entropy.OP,
        _linear_cross_entropy.OP,
        _rotary.OP,
        *_activations.OPS,
        _bias_gelu.OP,
        *_glu.OPS,
        _dropout.OP,
        _embedding.OP,
        _int8_linear.OP,
        _int4_linear.OP,
        *_fp8_linear.OPS,
        _sampling.OP,
        _adamw_step.OP,
        _lion.OP,
        _muon.OP,
    )
}

__all__ = [
    "GELU",
    "OPS",
    "Adam",
    "AdamW",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "GroupNorm",
    "Int4Linear",
    "Int8Linear",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "Lion",
    "Muon",
    "Op",
    "PatchReport",
    "RMSNorm",
    "adamw_step",
    "add_layer_norm",
    "add_rms_norm",
    "backend",
    "bias_gelu",
    "cross_entropy",
    "dequantize_fp8",
    "dequantize_int4",
    "dequantize_int8",
    "dropout",
    "embedding",
    "explain",
    "flash_attention",
    "flash_attention_decode",
    "flash_attention_varlen",
    "fp8_linear",
    "geglu",
    "gelu",
    "group_norm",
    "int4_linear",
    "int8_linear",
    "layer_norm",
    "linear_cross_entropy",
    "lion_step",
    "log_softmax",
    "merge_attention",
    "muon_step",
    "patch",
    "quantize_fp8",
    "quantize_int4",
    "quantize_int8",
    "register",
    "relu_squared",
    "rms_norm",
    "rotary_embedding",
    "sample",
    "scaled_dot_product_attention",
    "softmax",
    "swiglu",
]
