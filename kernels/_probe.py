"""Whether a fused op does what a module or a function does, on random numbers in its place."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]


class Candidate(NamedTuple):
    """A fused op, and the forward, or the function in its place, that puts it into a module."""

    op: str
    forward: Forward
    attribute: str = "forward"


class Kind(NamedTuple):
    """What to do with a kind of module.

    Attributes:
        candidates: Forwards, of which the first that agrees is taken.
        twin: The module without hooks, with random parameters of a dtype.
        inputs: A float32 or integer input of the twin.
    """

    candidates: Sequence[Candidate]
    twin: Callable[[torch.dtype, torch.Generator], nn.Module]
    inputs: Callable[[torch.Generator], Tensor]


def device_of(module: nn.Module) -> torch.device:
    """Where the probe runs: on the module's device, if that holds numbers."""
    place = next((p.device for p in module.parameters()), torch.device("cpu"))
    return torch.device("cpu") if place.type == "meta" else place


def twin_of(
    module: nn.Module, dtype: torch.dtype, generator: torch.Generator, **shapes: Sequence[int]
) -> Any:
    """The module in evaluation, without hooks, its own parameters random, of their or other shapes.

    What the caller then changes of it does not change the module.
    """
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["training"] = False
    twin.__dict__["_parameters"] = {
        name: p if p is None else _random(shapes.get(name, p.shape), dtype, generator, p.device)
        for name, p in module._parameters.items()
    }
    return twin


def _random(
    shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Tensor:
    place = torch.device("cpu") if device.type == "meta" else device
    return torch.randn(*shape, generator=generator).to(place, dtype).requires_grad_()


def _outcome(forward: Forward, twin: nn.Module, x: Tensor) -> list[Tensor]:
    """The result, and the gradients of whatever has one."""
    y = forward(twin, x)
    graded = [t for t in (x, *twin._parameters.values()) if t is not None and t.requires_grad]
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    grads = torch.autograd.grad(y, graded, dy, allow_unused=True, materialize_grads=True)
    return [y.detach(), *grads]


def _disagreement(got: Sequence[Tensor], want: Sequence[Tensor]) -> str | None:
    """How two outcomes differ by more than roundings, or None."""
    for name, ours, theirs in zip(("result", *["gradient"] * len(want)), got, want, strict=False):
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            kinds = [f"{tuple(t.shape)} {t.dtype}" for t in (ours, theirs)]
            return f"its {name} is {kinds[0]}, not {kinds[1]}"
        ulps = 32 if theirs.dtype == torch.float32 else 8
        error = (ours.double() - theirs.double()).abs().max()
        if not error <= ulps * torch.finfo(theirs.dtype).eps * theirs.double().abs().max():
            return f"its {name} is off by {error:.1g}"
    return None


def chosen_for(module: nn.Module, kind: Kind) -> Candidate | str:
    """The candidate that agrees with the module, or why there is none."""
    if "forward" in module.__dict__:
        return "its forward is already replaced"
    own = next((p.dtype for p in module._parameters.values() if p is not None), torch.float32)
    device, found = device_of(module), ""
    forward = type(module).forward
    left = list(kind.candidates)
    for dtype in dict.fromkeys((torch.float32, own)):  # few digits would hide another eps
        generator = torch.Generator().manual_seed(0)
        twin, x = kind.twin(dtype, generator), kind.inputs(generator).to(device)
        if x.is_floating_point():
            x = x.to(dtype).requires_grad_()
        try:
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.autocast(device.type, enabled=False),
            ):
                want = _outcome(forward, twin, x)
                reasons = {c: _disagreement(_outcome(c.forward, twin, x), want) for c in left}
        except Exception as error:  # whatever a stranger's forward raises
            return f"the probe failed: {type(error).__name__}: {error}"
        found = "; ".join(f"{c.op}: {reason}" for c, reason in reasons.items() if reason)
        left = [c for c, reason in reasons.items() if reason is None]
    return left[0] if left else f"no fused op agrees with it ({found})"


def difference(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    **options: Any,
) -> str | None:
    """How two functions differ, in result or gradient of the first input, or None.

    In float32, which hides nothing, and in bfloat16, where dtypes of results may differ.
    """
    for dtype in (torch.float32, torch.bfloat16):
        outcomes = []
        for function in (ours, theirs):
            first, *rest = (t.to(dtype) if t.is_floating_point() else t for t in inputs)
            x = first.detach().requires_grad_()
            try:
                with (
                    torch.inference_mode(False),
                    torch.enable_grad(),
                    torch.autocast("cpu", enabled=False),
                ):
                    y = function(x, *rest, **options)
                    dy = torch.linspace(0.5, 1, y.numel()).view(y.shape).to(y.dtype)
                    outcomes.append([y.detach(), *torch.autograd.grad(y, x, dy)])
            except Exception as error:  # whatever a stranger's function raises
                return f"the probe failed: {type(error).__name__}: {error}"
        reason = _disagreement(*outcomes)
        if reason is not None:
            return reason
    return None
