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
from .bias_gelu import bias_gelu
from .dropout import Dropout, dropout
from .embedding import Embedding, embedding
from .glu import geglu, swiglu
from .layer_norm import LayerNorm, layer_norm
from .rms_norm import RMSNorm, rms_norm
from .rotary import rotary_embedding
from .softmax import log_softmax, softmax

if _dispatch._cpu_runner == "interpreter":
    _interpreter.install()

OPS = {module.OP.name: module.OP for module in (_layer_norm, _rms_norm)}
OPS |= {op.name: op for op in (*_add_norm.OPS, *_softmax.OPS)}
OPS |= {op.name: op for op in (*_activations.OPS, _bias_gelu.OP, *_glu.OPS, _rotary.OP)}
OPS |= {op.name: op for op in (_dropout.OP, _embedding.OP)}

__all__ = [
    "GELU",
    "OPS",
    "Dropout",
    "Embedding",
    "LayerNorm",
    "Op",
    "RMSNorm",
    "add_layer_norm",
    "add_rms_norm",
    "backend",
    "bias_gelu",
    "dropout",
    "embedding",
    "explain",
    "geglu",
    "gelu",
    "layer_norm",
    "log_softmax",
    "relu_squared",
    "rms_norm",
    "rotary_embedding",
    "softmax",
    "swiglu",
]
