"""Fused Triton ops with PyTorch's signatures. ``OPS`` lists each beside its eager reference."""

from . import _dispatch, _interpreter
from . import activations as _activations
from . import add_norm as _add_norm
from . import bias_gelu as _bias_gelu
from . import dropout as _dropout
from . import embedding as _embedding
from . import glu as _glu
from . import layer_norm as _layer_norm
from . import rms_norm as _rms_norm
from . import rotary as _rotary
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
from .dropout import Dropout, dropout
from .embedding import Embedding, embedding
from .glu import geglu, swiglu
from .layer_norm import LayerNorm, layer_norm
from .optim import Adam, AdamW, Lion, Muon, adamw_step, lion_step, muon_step
from .optim import lion as _lion
from .optim import muon as _muon
from .optim import step as _adamw_step
from .rms_norm import RMSNorm, rms_norm
from .rotary import rotary_embedding
from .softmax import log_softmax, softmax

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
        *_add_norm.OPS,
        *_softmax.OPS,
        _rotary.OP,
        *_activations.OPS,
        _bias_gelu.OP,
        *_glu.OPS,
        _dropout.OP,
        _embedding.OP,
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
    "Dropout",
    "Embedding",
    "LayerNorm",
    "Lion",
    "Muon",
    "Op",
    "RMSNorm",
    "adamw_step",
    "add_layer_norm",
    "add_rms_norm",
    "backend",
    "bias_gelu",
    "dropout",
    "embedding",
    "explain",
    "flash_attention",
    "flash_attention_decode",
    "flash_attention_varlen",
    "geglu",
    "gelu",
    "layer_norm",
    "lion_step",
    "log_softmax",
    "merge_attention",
    "muon_step",
    "register",
    "relu_squared",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "softmax",
    "swiglu",
]
