"""What each op is timed against: eager and compiled PyTorch, its forced backends, and peers."""

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.kernels import Op

Call = Callable[..., Any]


@dataclass
class Field:
    """The contenders of one op.

    Attributes:
        calls: By name, each with the op's own keyword arguments.
        skipped: Why others are not there, by name.
    """

    calls: dict[str, Call] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def eager_of(op: Op) -> Call:
    """PyTorch's own op where the fused one stands in for it, else the reference."""
    rule = getattr(op.fused, "dispatch", None)
    return rule.eager if rule is not None else op.reference


def contenders(op: Op, wanted: list[str] | None = None) -> Field:
    """The op, eager, compiled, and every peer that is installed.

    Args:
        op: The op.
        wanted: Names to keep; ``fused`` and ``eager`` always stay.
    """
    found = Field()
    found.calls["fused"] = op.fused
    found.calls["eager"] = eager_of(op)
    found.calls["compiled"] = torch.compile(eager_of(op), dynamic=False)
    for name, package, build in _PEERS.get(op.name, ()):
        try:
            found.calls[name] = build()
        except ImportError:
            found.skipped[name] = f"{package} is not installed"
        except Exception as error:  # a peer that does not load must not end the run
            found.skipped[name] = f"{type(error).__name__}: {error}"
    if wanted is not None:
        kept = {"fused", "eager", *wanted}
        found.skipped |= {name: "not asked for" for name in found.calls if name not in kept}
        found.calls = {name: call for name, call in found.calls.items() if name in kept}
    return found


def triton_peers(op_name: str) -> dict[str, Call]:
    """Installed peers of an op whose own kernels are Triton's, by name."""
    found = {}
    for name, _, build in _PEERS.get(op_name, ()):
        if name == "liger":
            try:
                found[name] = build()
            except ImportError:
                continue
    return found


def versions() -> dict[str, str]:
    """Installed peers and their versions."""
    found = {}
    for package in ("liger-kernel", "flash-attn", "apex", "xformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# --- peers --------------------------------------------------------------------------------------


def liger(module: str, name: str) -> Any:
    """A class of Liger-Kernel's ``ops``."""
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)


def _liger_layer_norm() -> Call:
    function = liger("layer_norm", "LigerLayerNormFunction")

    def call(
        input: Tensor, normalized_shape: Any, weight: Tensor, bias: Tensor, eps: float = 1e-5
    ) -> Tensor:
        return function.apply(input, weight, bias, eps)

    return call


def _liger_rms_norm() -> Call:
    function = liger("rms_norm", "LigerRMSNormFunction")

    def call(
        input: Tensor, normalized_shape: Any, weight: Tensor, eps: float | None = None
    ) -> Tensor:
        eps = torch.finfo(input.dtype).eps if eps is None else eps
        return function.apply(input, weight, eps, 0.0, "llama", False)

    return call


def _liger_gated(module: str, name: str) -> Callable[[], Call]:
    def build() -> Call:
        function = liger(module, name)

        def call(gate: Tensor, up: Tensor, **_: Any) -> Tensor:
            return function.apply(gate, up)

        return call

    return build


def _liger_softmax() -> Call:
    function = liger("softmax", "LigerSoftmaxFunction")

    def call(input: Tensor, dim: int = -1) -> Tensor:
        if dim not in (-1, input.dim() - 1):
            raise ValueError("liger's softmax is over the last dimension")
        return function.apply(input)

    return call


def _liger_cross_entropy() -> Call:
    function = liger("cross_entropy", "LigerCrossEntropyFunction")

    def call(
        input: Tensor,
        target: Tensor,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float = 0.0,
    ) -> Tensor:
        # It overwrites its input, which a drop-in may not: the copy is its price here.
        options = (z_loss, label_smoothing, "mean", softcap or None)
        return function.apply(input.clone(), target, None, ignore_index, *options)[0]

    return call


def _liger_linear_cross_entropy() -> Call:
    function = liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")

    def call(input: Tensor, linear_weight: Tensor, target: Tensor, impl: str = "") -> Tensor:
        return function.apply(input, linear_weight, target)[0]

    return call


def _all_logits() -> Call:
    """PyTorch's two ops, one after the other: what the eager path in chunks stands in for."""

    def call(input: Tensor, linear_weight: Tensor, target: Tensor, impl: str = "") -> Tensor:
        return F.cross_entropy(F.linear(input, linear_weight), target)

    return call


def _torch_chunked() -> Call:
    """PyTorch's own linear cross-entropy in chunks, new in 2.13."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError

    def call(input: Tensor, linear_weight: Tensor, target: Tensor, impl: str = "") -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(input, linear_weight, target, options=options)

    return call


def _apex_layer_norm() -> Call:
    function = importlib.import_module("apex.normalization").fused_layer_norm_affine

    def call(
        input: Tensor, normalized_shape: Any, weight: Tensor, bias: Tensor, eps: float = 1e-5
    ) -> Tensor:
        return function(input, weight, bias, normalized_shape, eps)

    return call


def _sdpa(backend: str) -> Callable[[], Call]:
    """PyTorch's attention by one forced backend, in the layout of ``flash_attention``."""

    def build() -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = SDPBackend[backend]

        def call(
            q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, softmax_scale: Any = None
        ) -> Tensor:
            with sdpa_kernel(chosen):
                out = F.scaled_dot_product_attention(
                    q.transpose(1, 2),
                    k.transpose(1, 2),
                    v.transpose(1, 2),
                    is_causal=causal,
                    scale=softmax_scale,
                    enable_gqa=q.shape[2] != k.shape[2],
                )
            return out.transpose(1, 2)

        return call

    return build


def _flash_attn() -> Call:
    function = importlib.import_module("flash_attn").flash_attn_func

    def call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return function(q, k, v, **options)

    return call


def _flex_attention() -> Call:
    """FlexAttention through Inductor."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    masks: dict[Any, Any] = {}

    def causal_mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        return j <= i

    def call(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, softmax_scale: Any = None
    ) -> Tensor:
        key = (q.shape[1], k.shape[1], q.device)
        if causal and key not in masks:
            masks[key] = create_block_mask(causal_mask, None, None, key[0], key[1], str(q.device))
        out = compiled(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            block_mask=masks[key] if causal else None,
            scale=softmax_scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2)

    return call


_BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
_PEERS: dict[str, list[tuple[str, str, Callable[[], Call]]]] = {
    "layer_norm": [
        ("liger", "liger-kernel", _liger_layer_norm),
        ("apex", "apex", _apex_layer_norm),
    ],
    "rms_norm": [("liger", "liger-kernel", _liger_rms_norm)],
    "swiglu": [("liger", "liger-kernel", _liger_gated("swiglu", "LigerSiLUMulFunction"))],
    "geglu": [("liger", "liger-kernel", _liger_gated("geglu", "LigerGELUMulFunction"))],
    "softmax": [("liger", "liger-kernel", _liger_softmax)],
    "cross_entropy": [("liger", "liger-kernel", _liger_cross_entropy)],
    "linear_cross_entropy": [
        ("all logits", "torch", _all_logits),
        ("torch chunked", "torch 2.13", _torch_chunked),
        ("liger chunked", "liger-kernel", _liger_linear_cross_entropy),
    ],
    "flash_attention": [
        *((f"sdpa {name.split('_')[0].lower()}", "torch", _sdpa(name)) for name in _BACKENDS),
        ("flex", "torch", _flex_attention),
        ("flash-attn", "flash-attn", _flash_attn),
    ],
}
