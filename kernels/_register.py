"""Launchers as PyTorch operators ``torch.ops.fastlm.*``: what autograd and torch.compile see.

``torch.library.Library`` costs about 2 microseconds a call where ``torch.library.custom_op``
costs 9 (torch 2.13, CPU), so ops are defined with it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("fastlm", "FRAGMENT")


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the first tensor's GPU current for the launch: Triton launches on the current one."""

    @functools.wraps(launch)
    def guarded(*args: Any) -> Any:
        lists = (a if isinstance(a, (list, tuple)) else (a,) for a in args)
        device = next(t.device for a in lists for t in a if isinstance(t, Tensor))
        if device.index == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(device):
            return launch(*args)

    return guarded


def torch_op(
    name: str,
    *,
    fake: Callable[..., Any],
    mutates: Sequence[str] = (),
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a launcher as ``torch.ops.fastlm.<name>`` and gives back that operator.

    Args:
        name: The operator's name.
        fake: The shapes and dtypes of the results, from the same arguments.
        mutates: Names of the arguments that the launcher writes.
        setup_context: Saves for the backward: ``(ctx, inputs, output)``.
        backward: ``(ctx, *grads)`` to one gradient an input. None: not differentiable.
    """

    def register(launch: Callable[..., Any]) -> Callable[..., Any]:
        schema = torch.library.infer_schema(launch, mutates_args=mutates)
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, launch, "CPU")
        LIBRARY.impl(name, _on_its_device(launch), "CUDA")
        torch.library.register_fake(f"fastlm::{name}", fake, lib=LIBRARY)
        if backward is not None:
            torch.library.register_autograd(
                f"fastlm::{name}", backward, setup_context=setup_context, lib=LIBRARY
            )
        return getattr(torch.ops.fastlm, name).default

    return register


def eager_gradients(
    op: Callable[..., Any], inputs: Sequence[Any], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """One gradient an input of ``op(*inputs)``, through PyTorch's own graph.

    For a backward under ``create_graph=True``: kernels have no second derivative, PyTorch has.
    """
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    with torch.enable_grad():
        outputs = op(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            wanted,
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
    by_input = dict(zip(map(id, wanted), found, strict=True))
    return tuple(by_input.get(id(t)) for t in inputs)
