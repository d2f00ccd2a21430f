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

MOST_TUNED = "max-autotune-no-cudagraphs"  # of torch.compile, a contender of its own


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
    if wanted and MOST_TUNED in wanted:  # minutes of tuning a case: only if asked for
        found.calls[MOST_TUNED] = torch.compile(eager_of(op), dynamic=False, mode=MOST_TUNED)
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


def has_flex(op_name: str) -> bool:
    """Whether FlexAttention takes the op's arguments, in its own layout."""
    return any(build is _flex_attention for _, _, build in _PEERS.get(op_name, ()))


def versions() -> dict[str, str]:
    """Installed peers and their versions."""
    found = {}
    for package in ("liger-kernel", "flash-attn", "apex", "xformers", "transformers"):
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
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor,
        eps: float | None = None,
        *,
        weight_offset: float = 0.0,
    ) -> Tensor:
        eps = torch.finfo(input.dtype).eps if eps is None else eps
        return function.apply(input, weight, eps, weight_offset, "llama", False)

    return call


def _liger_add_rms_norm() -> Call:
    function = liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")

    def call(
        x: Tensor,
        residual: Tensor,
        normalized_shape: Any,
        weight: Tensor,
        eps: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        return function.apply(x, residual, weight, eps, 0.0, "llama", False)

    return call


def _liger_relu_squared() -> Call:
    function = liger("relu_squared", "LigerReLUSquaredFunction")

    def call(x: Tensor) -> Tensor:
        return function.apply(x)

    return call


def _liger_gated(module: str, name: str) -> Callable[[], Call]:
    def build() -> Call:
        function = liger(module, name)

        def call(gate: Tensor, up: Tensor | None = None, approximate: str = "tanh") -> Tensor:
            if up is None:
                raise NotImplementedError("it takes the halves apart")
            if approximate != "tanh":
                raise NotImplementedError("it computes GELU by tanh alone")
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
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float = 0.0,
    ) -> Tensor:
        options = (z_loss, label_smoothing, reduction, softcap or None)
        # It overwrites its input, which a drop-in may not: the copy is its price here.
        return function.apply(input.clone(), target, weight, ignore_index, *options)[0]

    return call


def _liger_linear_cross_entropy() -> Call:
    function = liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")

    def call(
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        impl: str = "chunked",
    ) -> Tensor:
        if impl != "chunked":
            raise NotImplementedError("it works in chunks")
        given = (input, linear_weight, target, linear_bias, weight, ignore_index)
        return function.apply(*given)[0]

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


def _sdpa(backend: str | None) -> Callable[[], Call]:
    """PyTorch's attention by one forced backend, or its own choice."""

    def build() -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if backend is None:
            return F.scaled_dot_product_attention
        chosen = getattr(SDPBackend, backend)

        def call(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            with sdpa_kernel(chosen):
                return F.scaled_dot_product_attention(query, key, value, **options)

        return call

    return build


def _in_our_layout(build: Callable[[], Call]) -> Callable[[], Call]:
    """A contender of ``scaled_dot_product_attention`` under ``flash_attention``'s arguments."""

    def other() -> Call:
        function = build()

        def call(
            q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, softmax_scale: Any = None
        ) -> Tensor:
            if causal and q.shape[1] != k.shape[1]:
                raise NotImplementedError("PyTorch lines up the first rows, not the last")
            heads_first = [t.transpose(1, 2) for t in (q, k, v)]
            options = {"is_causal": causal, "scale": softmax_scale}
            grouped = q.shape[2] != k.shape[2]
            return function(*heads_first, **options, enable_gqa=grouped).transpose(1, 2)

        return call

    return other


def note(op: Op, name: str, inputs: dict[str, Any]) -> str:
    """Which backend PyTorch's attention chooses for these inputs, where the contender asks it."""
    if "query" in inputs and name in ("eager", "sdpa"):
        options = {k: inputs[k] for k in ("attn_mask", "is_causal") if k in inputs}
        heads_first = [inputs[k] for k in ("query", "key", "value")]
    elif op.name == "flash_attention" and name == "sdpa":
        heads_first = [inputs[k].transpose(1, 2) for k in ("q", "k", "v")]
        options = {"is_causal": inputs.get("causal", False)}
    else:
        return ""
    from torch.nn.attention import SDPBackend

    grouped = heads_first[0].shape[1] != heads_first[1].shape[1]
    number = torch._fused_sdp_choice(*heads_first, **options, enable_gqa=grouped)
    return f"backend {SDPBackend(number).name.removesuffix('_ATTENTION').lower()}"


def _flash_attn() -> Call:
    function = importlib.import_module("flash_attn").flash_attn_func

    def call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return function(q, k, v, **options)

    return call


def _flex_attention() -> Call:
    """FlexAttention through Inductor, in PyTorch's own layout."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_by(torch.compile(flex_attention, dynamic=False))


def flex_by(compiled: Call) -> Call:
    """FlexAttention by what stands for its compiled function."""
    from torch.nn.attention.flex_attention import create_block_mask

    masks: dict[Any, Any] = {}

    def causal_mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        return j <= i

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        scale: Any = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        lengths = (query.shape[2], key.shape[2], query.device)
        if is_causal and lengths not in masks:
            masks[lengths] = create_block_mask(causal_mask, None, None, *lengths[:2], query.device)
        mask = masks[lengths] if is_causal else None
        return compiled(query, key, value, block_mask=mask, scale=scale, enable_gqa=enable_gqa)

    return call


_BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
_ATTENTION: list[tuple[str, str, Callable[[], Call]]] = [
    *((f"sdpa {name.split('_')[0].lower()}", "torch", _sdpa(name)) for name in _BACKENDS),
    ("flex", "torch", _flex_attention),
]
_PEERS: dict[str, list[tuple[str, str, Callable[[], Call]]]] = {
    "layer_norm": [
        ("liger", "liger-kernel", _liger_layer_norm),
        ("apex", "apex", _apex_layer_norm),
    ],
    "rms_norm": [("liger", "liger-kernel", _liger_rms_norm)],
    "add_rms_norm": [("liger", "liger-kernel", _liger_add_rms_norm)],
    "relu_squared": [("liger", "liger-kernel", _liger_relu_squared)],
    "swiglu": [("liger", "liger-kernel", _liger_gated("swiglu", "LigerSiLUMulFunction"))],
    "geglu": [("liger", "liger-kernel", _liger_gated("geglu", "LigerGELUMulFunction"))],
    "softmax": [("liger", "liger-kernel", _liger_softmax)],
    "cross_entropy": [("liger", "liger-kernel", _liger_cross_entropy)],
    "linear_cross_entropy": [
        ("all logits", "torch", _all_logits),
        ("torch chunked", "torch 2.13", _torch_chunked),
        ("liger chunked", "liger-kernel", _liger_linear_cross_entropy),
    ],
    "scaled_dot_product_attention": _ATTENTION,
    "flash_attention": [
        ("sdpa", "torch", _in_our_layout(_sdpa(None))),
        *((name, package, _in_our_layout(build)) for name, package, build in _ATTENTION),
        ("flash-attn", "flash-attn", _flash_attn),
    ],
}
