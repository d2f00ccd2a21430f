"""Fused ops in the modules of one model, and out of them again.

    report = patch(model)      # print(report) says what runs fused now, and what does not and why
    report.undo()
    with patch(model): ...     # the same for a block

A module keeps its identity, class, parameters, hooks and state_dict: it only gets a ``forward`` of
its own, before its class's, or a causal language model a ``_loss_function``. Other models, classes
and functions are left alone.

Names prove nothing, so each replacement has to give what the module gives, with the same gradients,
on random numbers in place of its parameters. Where none does, the module stays as it is.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _calls
from ._probe import Candidate, Forward, Kind, chosen_for, twin_of
from .activations import gelu, relu_squared
from .embedding import Embedding
from .glu import geglu, swiglu
from .group_norm import GroupNorm
from .layer_norm import LayerNorm
from .rms_norm import rms_norm

# --- kinds of modules ---------------------------------------------------------------------------


def _takes_one(forward: Forward) -> bool:
    """Whether a method takes one argument beside the module: others would be lost."""
    return len(inspect.signature(forward).parameters) == 2


def _only(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The one argument of a forward, whatever its name."""
    (argument,) = (*args, *kwargs.values())
    return argument


def _rows(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Rows far from 0, down to such that eps counts."""
    x = 1 + torch.randn(3, *shape, generator=generator)
    return x * torch.tensor([1.0, 1e-1, 2e-3]).view(3, *[1] * len(shape))


def _torch_rms_norm(self: Any, x: Tensor) -> Tensor:
    return rms_norm(x, self.normalized_shape, self.weight, self.eps)


def _rms_norm(eps_name: str, weight_offset: float) -> Forward:
    """Of Hugging Face's classes, whose result has the input's dtype where the weight has it too."""

    def forward(self: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
        x = _only(args, kwargs)
        if x.dtype != self.weight.dtype:  # the classes differ in what they then do
            return type(self).forward(self, x)
        eps = getattr(self, eps_name)
        y = rms_norm(x, self.weight.shape, self.weight, eps, weight_offset=weight_offset)
        return y.to(x.dtype)  # under autocast too

    return forward


_NORMS: Mapping[type[nn.Module], Candidate] = {
    nn.LayerNorm: Candidate("layer_norm", LayerNorm.forward),
    nn.RMSNorm: Candidate("rms_norm", _torch_rms_norm),
    nn.GroupNorm: Candidate("group_norm", GroupNorm.forward),
}


def _norm(module: nn.Module) -> Kind | str | None:
    base = next((kind for kind in _NORMS if isinstance(module, kind)), None)
    if base is not None:
        if type(module).forward is not base.forward:
            return "its class has a forward of its own"
        candidates = [_NORMS[base]]
        groups: Any = module
        shape = (groups.num_channels, 2) if base is nn.GroupNorm else groups.normalized_shape
    else:
        weight = getattr(module, "weight", None)
        if not type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")) or weight is None:
            return None
        eps_name = next((n for n in ("variance_epsilon", "eps") if hasattr(module, n)), None)
        if eps_name is None:
            return "it has no variance_epsilon or eps"
        if not _takes_one(type(module).forward):
            return "its forward takes other than one argument"
        shape = tuple(weight.shape)
        candidates = [
            Candidate(f"rms_norm{label}", _rms_norm(eps_name, offset))
            for label, offset in (("", 0.0), (" of 1 + weight", 1.0))
        ]
    return Kind(
        candidates,
        functools.partial(twin_of, module),
        functools.partial(_rows, shape),
    )


def _elementwise(op: Callable[[Tensor], Tensor]) -> Forward:
    def forward(self: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return op(_only(args, kwargs))

    return forward


_ACTIVATIONS = (
    Candidate("gelu", _elementwise(gelu)),
    Candidate('gelu "tanh"', _elementwise(lambda x: gelu(x, approximate="tanh"))),
    Candidate("relu_squared", _elementwise(relu_squared)),
)


def _activation(module: nn.Module) -> Kind | str | None:
    name = type(module).__name__
    if not ("GELU" in name or "GeLU" in name or name.startswith("ReLUSquared")):
        return None
    if module._parameters or module._modules:
        return "it has parameters or modules of its own"
    if not _takes_one(type(module).forward):
        return "its forward takes other than one argument"
    return Kind(
        _ACTIVATIONS,
        functools.partial(twin_of, module),
        lambda generator: 3 * torch.randn(256, generator=generator),
    )


class _Half(nn.Module):
    """Stands for a projection in a probe: gives one half of its input."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self.which = which

    def forward(self, x: Tensor) -> Tensor:
        return x.chunk(2, -1)[self.which]


def _two_projections(op: Callable[..., Tensor]) -> Forward:
    def forward(self: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
        x = _only(args, kwargs)
        return self.down_proj(op(self.gate_proj(x), self.up_proj(x)))

    return forward


def _one_projection(op: Callable[..., Tensor]) -> Forward:
    def forward(self: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.down_proj(op(self.gate_up_proj(_only(args, kwargs))))

    return forward


_GATED = {
    "swiglu": swiglu,
    "geglu": geglu,
    'geglu "tanh"': lambda gate, up=None: geglu(gate, up, "tanh"),
}


def _mlp(module: nn.Module) -> Kind | str | None:
    """Gated units under Hugging Face's names. The probe leaves the projections out."""
    stand_ins: dict[str, nn.Module] = {"down_proj": nn.Identity()}
    if {"gate_proj", "up_proj", "down_proj"} <= module._modules.keys():
        stand_ins |= {"gate_proj": _Half(0), "up_proj": _Half(1)}
        unit = _two_projections
    elif {"gate_up_proj", "down_proj"} <= module._modules.keys():
        stand_ins |= {"gate_up_proj": nn.Identity()}
        unit = _one_projection
    else:
        return None
    if not _takes_one(type(module).forward):
        return "its forward takes other than one argument"

    def twin(dtype: torch.dtype, generator: torch.Generator) -> nn.Module:
        found = twin_of(module, dtype, generator)
        found.__dict__["_modules"] = {**module._modules, **stand_ins}
        return found

    return Kind(
        [Candidate(name, unit(op)) for name, op in _GATED.items()],
        twin,
        lambda generator: 3 * torch.randn(4, 128, generator=generator),
    )


def _embedding(module: nn.Module) -> Kind | str | None:
    if not isinstance(module, nn.Embedding):
        return None
    if type(module).forward is not nn.Embedding.forward:
        return "its class has a forward of its own"
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return "max_norm, scale_grad_by_freq or sparse is set"
    V, N = module.weight.shape
    rows = min(V, 8)  # a whole table of random numbers could be gigabytes

    def twin(dtype: torch.dtype, generator: torch.Generator) -> nn.Module:
        found = twin_of(module, dtype, generator, weight=(rows, N))
        if module.padding_idx is not None:
            found.__dict__["padding_idx"] = min(module.padding_idx, rows - 1)
        return found

    return Kind(
        [Candidate("embedding", Embedding.forward)],
        twin,
        lambda generator: torch.randint(rows, (2, 9), generator=generator),
    )


_CALLS: Mapping[str, Callable[[nn.Module, nn.Module], Candidate | str | None]] = {
    "rotary": _calls.rotary,
    "loss": _calls.loss,
}
_KINDS: Mapping[str, Callable[[nn.Module], Kind | str | None]] = {
    "norm": _norm,
    "mlp": _mlp,
    "activation": _activation,
    "embedding": _embedding,
}


# --- public -------------------------------------------------------------------------------------


class Swap(NamedTuple):
    """A module that runs a fused op: its name in the model, its class, and the op."""

    name: str
    kind: str
    op: str


class Skip(NamedTuple):
    """A module that was left as it was: its name in the model, its class, and why."""

    name: str
    kind: str
    reason: str


class PatchReport:
    """What ``patch`` did to a model; ``print`` it. As a context manager it ends with ``undo``.

    Attributes:
        swapped: The modules that run fused ops.
        skipped: Those that do not, though of a kind that was asked for.
    """

    def __init__(self) -> None:
        self.swapped: list[Swap] = []
        self.skipped: list[Skip] = []
        self._modules: list[tuple[str, nn.Module, str, Forward]] = []

    def _take(self, name: str, module: nn.Module, found: Candidate | str) -> None:
        """Puts what was found into the module, or notes why there is nothing."""
        kind = type(module).__name__
        if isinstance(found, str):
            self.skipped.append(Skip(name, kind, found))
            return
        value = found.forward
        if found.attribute == "forward":
            value = MethodType(value, module)
        module.__dict__[found.attribute] = value
        self._modules.append((name, module, found.attribute, value))
        self.swapped.append(Swap(name, kind, found.op))

    def undo(self) -> None:
        """Gives every module what it had before. A second time it does nothing.

        Raises:
            RuntimeError: Something else has replaced a forward since: undo that first. Nothing is
                changed then.
        """
        for name, module, attribute, value in self._modules:
            if module.__dict__.get(attribute) is not value:
                raise RuntimeError(
                    f"undo: the {attribute} of {name} ({type(module).__name__}) was replaced after "
                    "patch; undo that first"
                )
        for _, module, attribute, _ in self._modules:
            del module.__dict__[attribute]
        self._modules.clear()

    def __enter__(self) -> "PatchReport":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        by_op: dict[tuple[str, str], list[str]] = {}
        for name, kind, text in (*self.swapped, *self.skipped):
            by_op.setdefault((kind, text), []).append(name)
        fused = {(kind, op) for _, kind, op in self.swapped}
        lines = [f"{len(self.swapped)} modules run fused ops, {len(self.skipped)} do not"]
        for (kind, text), names in by_op.items():
            verb = "runs" if (kind, text) in fused else "stays:"
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"  {kind} {verb} {text}: {names[0]}{more}")
        return "\n".join(lines)


def patch(
    model: nn.Module,
    *,
    norm: bool = True,
    mlp: bool = True,
    activation: bool = True,
    embedding: bool = True,
    rotary: bool = True,
    loss: bool = True,
) -> PatchReport:
    """Lets the modules of a model run the fused ops that do what they do.

    Each of them, of PyTorch or Hugging Face, is first compared with the op on random numbers:
    results and gradients, in float32 and in the dtype of its parameters.

    Args:
        model: Any module; it keeps its parameters, hooks and state_dict. Patch before
            ``torch.compile``.
        norm: ``nn.LayerNorm``, ``nn.RMSNorm``, ``nn.GroupNorm`` and classes named ...RMSNorm.
        mlp: Modules with gate_proj, up_proj and down_proj, or gate_up_proj and down_proj: the unit
            between their projections.
        activation: ``nn.GELU`` and classes named ...GELU... or ReLUSquared...
        embedding: ``nn.Embedding``.
        rotary: Attention of Hugging Face's that calls ``apply_rotary_pos_emb``, as Llama's: that
            function, for these modules alone.
        loss: The loss of Hugging Face's causal language models: cross_entropy of the logits as
            they are, without their copy in float32.

    Returns:
        What was swapped and what was not, with ``undo()``.

    Raises:
        ValueError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"patch: model must be a torch.nn.Module; got {type(model).__name__}")
    wanted = {"norm": norm, "mlp": mlp, "activation": activation, "embedding": embedding}
    wanted |= {"rotary": rotary, "loss": loss}
    report = PatchReport()
    _patch_modules(model, wanted, report)
    for option, choose in _CALLS.items():
        for name, module in model.named_modules() if wanted[option] else ():
            found = choose(module, model)
            if found is not None:
                report._take(name, module, found)
    return report


def _patch_modules(model: nn.Module, wanted: Mapping[str, bool], report: PatchReport) -> None:
    """Puts fused ops into modules that are one, or a gated unit."""
    inside: set[nn.Module] = set()  # activations of a unit that is fused whole
    for name, module in model.named_modules():
        if module in inside or type(module).__module__.startswith(__package__):
            continue
        kinds = (find(module) for option, find in _KINDS.items() if wanted[option])
        kind = next((kind for kind in kinds if kind is not None), None)
        if kind is None:
            continue
        found = kind if isinstance(kind, str) else chosen_for(module, kind)
        report._take(name, module, found)
        if isinstance(found, Candidate) and found.op.split()[0] in _GATED:
            inside |= {m for n, m in module._modules.items() if m and not n.endswith("_proj")}
