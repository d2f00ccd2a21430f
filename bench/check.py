"""Whether a contender is right: its results and gradients against float64, by the contract.

``max|fused - exact| <= 2 max|eager - exact| + c ulp(max|exact|)``, c = 16 in float32, 2 in half.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Inputs = dict[str, Any]

_ULPS = {torch.float32: 16, torch.float16: 2, torch.bfloat16: 2}


def tensors(tree: Any) -> list[Tensor]:
    """The floating-point tensors of a tree, in order."""
    leaves = pytree.tree_leaves(tree)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def copies(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """The same values in fresh tensors, gradients wanted alike; floats in ``dtype`` if given."""

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        fresh = value.detach().clone()
        if dtype is not None and fresh.is_floating_point():
            fresh = fresh.to(dtype)
        return fresh.requires_grad_(value.requires_grad)

    return pytree.tree_map(copy, inputs)


def outcome(call: Callable[..., Any], inputs: Inputs, backward: bool = True) -> list[Tensor]:
    """All that a call on fresh inputs gives, changes and sends back, in float64.

    Args:
        call: An op.
        inputs: Its arguments, which it may change and which collect gradients.
        backward: Whether to run the backward pass, on the same gradient for every contender.
    """
    given = tensors(inputs)
    results = tensors(call(**inputs))
    graded = [t for t in results if t.requires_grad]
    if backward and graded:
        generator = torch.Generator(graded[0].device).manual_seed(1)
        noise = [
            torch.randn(t.shape, dtype=torch.float64, device=t.device, generator=generator).to(t)
            for t in graded
        ]
        torch.autograd.backward(graded, noise)
    gradients = [t.grad for t in given if t.grad is not None]
    return [t.detach().double() for t in (*results, *given, *gradients)]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills what host code allocates with NaN, or with -1, inside the block.

    A result that a kernel did not write then shows, where memory that was freed a moment ago may
    still hold the right answer.
    """
    names = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    places: list[tuple[Any, str]] = [*names, (Tensor, "new_empty")]
    before = [getattr(place, name) for place, name in places]

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            fresh = allocate(*args, **kwargs)
            number = fresh.is_floating_point() or fresh.is_complex()
            return fresh.fill_(float("nan") if number else 1 if fresh.dtype == torch.bool else -1)

        return filled

    try:
        for (place, name), allocate in zip(places, before, strict=True):
            setattr(place, name, poisoned(allocate))
        yield
    finally:
        for (place, name), allocate in zip(places, before, strict=True):
            setattr(place, name, allocate)


@dataclass(frozen=True)
class Verdict:
    """How far a contender is from float64.

    Attributes:
        error: The largest, relative to the largest element of the result it is in.
        eager: The same of eager PyTorch in the same dtype.
        wrong: Why it breaks the contract, or empty.
    """

    error: float
    eager: float
    wrong: str = ""


def judge(
    got: list[Tensor], eager: list[Tensor], exact: list[Tensor], dtype: torch.dtype
) -> Verdict:
    """Holds an outcome to the contract."""
    if len(got) != len(exact):
        return Verdict(float("inf"), 0.0, f"{len(got)} results and gradients, not {len(exact)}")
    worst = worst_eager = 0.0
    wrong = ""
    for i, (g, p, e) in enumerate(zip(got, eager, exact, strict=True)):
        if e.numel() == 0:
            continue
        largest = e.abs().nan_to_num(0, 0, 0).max().item()
        error = (g - e).abs().nan_to_num(0, 0, 0).max().item()
        peer = (p - e).abs().nan_to_num(0, 0, 0).max().item()
        bound = 2 * peer + _ULPS[dtype] * torch.finfo(dtype).eps * largest
        worst = max(worst, error / largest if largest else error)
        worst_eager = max(worst_eager, peer / largest if largest else peer)
        if g.shape != e.shape:
            wrong = wrong or f"result {i} has shape {tuple(g.shape)}, not {tuple(e.shape)}"
        elif not torch.equal(g.isfinite(), p.isfinite()):
            wrong = wrong or f"result {i} is not finite where it should be, or the reverse"
        elif error > bound:
            wrong = wrong or f"result {i} is off by {error:.3g}, more than {bound:.3g}"
    return Verdict(worst, worst_eager, wrong)
