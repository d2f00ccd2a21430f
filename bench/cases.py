"""The launches that each op makes, forward and backward, on inputs that take no memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm.kernels import Op

from .capture import Capture, Launch, capture_launches

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A launch, and the call of an op that made it.

    Attributes:
        op: The op's name.
        dtype: What the inputs were built in.
        size: The size the inputs were built at.
        special: What is unusual about the inputs: ``""``, ``"unaligned"`` or ``"only <input>"``.
        backward: Whether the backward pass made it.
        launch: The launch.
        work: Least bytes and floating-point operations of the forward call.
        contender: Whose launch it is: ``"fused"``, ours, or a peer's name.
    """

    op: str
    dtype: torch.dtype
    size: Mapping[str, Any]
    special: str
    backward: bool
    launch: Launch
    work: tuple[int, int]
    contender: str = "fused"

    @property
    def label(self) -> str:
        """The call in words: ``bfloat16 M=8192 N=4096``."""
        size = " ".join(f"{k}={_short(v)}" for k, v in self.size.items())
        return " ".join(filter(None, (_short(self.dtype), size, self.special)))


def _short(value: Any) -> str:
    if isinstance(value, (tuple, list)) and len(value) > 4:
        return f"({len(value)} from {value[0]})".replace(" ", "_")
    return str(value).removeprefix("torch.")


@contextmanager
def untouched_memory() -> Iterator[None]:
    """Keeps ``torch.empty`` from filling what it gives, so that gigabytes cost nothing."""
    settings: Any = torch.utils.deterministic  # a module with properties
    before = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before


_SMALL = 1 << 16  # elements; what is no larger is computed for real
_HOLLOW = (torch.int8, torch.uint8)  # beside floating point: codes of weights


class _Lazy(TorchDispatchMode):
    """Gives large numbers and bytes their shapes alone; other integers and views are real."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs an operator for real only where that costs little."""
        kwargs = kwargs or {}
        if func.is_view or func.namespace == "fastlm":  # ours make the launches to be recorded
            return func(*args, **kwargs)
        try:
            found = self._on_metadata(func, args, kwargs)
        except Exception:  # it reads values, or knows no metadata: run it
            return func(*args, **kwargs)
        if not any(_is_large(t) for t in pytree.tree_leaves(found)):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return args[0]
        return pytree.tree_map_only(
            Tensor, lambda m: torch.empty_strided(m.shape, m.stride(), dtype=m.dtype), found
        )

    def _on_metadata(self, func: Any, args: Any, kwargs: Any) -> Any:
        def metadata(t: Tensor) -> Tensor:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

        args, kwargs = pytree.tree_map_only(Tensor, metadata, (args, kwargs))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta")
        return func(*args, **{k: v for k, v in kwargs.items() if k != "generator"})


def _is_large(value: Any) -> bool:
    """Whether it is a tensor of numbers or bytes too many to compute."""
    if not isinstance(value, Tensor) or value.numel() <= _SMALL:
        return False
    return value.is_floating_point() or value.dtype in _HOLLOW


@contextmanager
def hollow_results() -> Iterator[None]:
    """Spares PyTorch's own operators inside the block the computation of large results."""
    with _Lazy():
        yield


def hollow(op: Op, dtype: torch.dtype, size: Mapping[str, Any], offset: int = 0) -> dict[str, Any]:
    """The op's example inputs, of which large tensors of floating point or bytes hold nothing.

    Args:
        op: The op.
        dtype: Of the inputs.
        size: Arguments of ``op.example``.
        offset: Elements by which every tensor starts past an aligned address.
    """
    with untouched_memory(), torch.random.fork_rng(devices=[]), _Lazy():
        torch.manual_seed(0)  # tables of lengths and indices are the same every time
        inputs = op.example(dtype, CPU, **size)
    if not offset:
        return inputs

    def shifted(value: Tensor) -> Tensor:
        steps = [st * (n - 1) for st, n in zip(value.stride(), value.shape, strict=True)]
        room = torch.empty(offset + max(0, 1 + sum(steps)), dtype=value.dtype)
        tensor = room.as_strided(value.shape, value.stride(), offset)
        if value.numel() <= _SMALL:
            tensor.copy_(value.detach())
        return tensor.requires_grad_(value.requires_grad)

    return pytree.tree_map_only(Tensor, shifted, inputs)


def _call(function: Callable[..., Any], inputs: dict[str, Any], capture: Capture) -> int:
    """Runs a call forward and backward, and says how many launches the forward made."""
    results = function(**inputs)
    forward = len(capture.launches)
    outputs = [t for t in pytree.tree_leaves(results) if isinstance(t, Tensor) and t.requires_grad]
    if outputs:
        # A loss is where a backward starts: its gradient is 1, which some hosts look at.
        gradients = [torch.empty_like(t) if t.dim() else torch.ones_like(t) for t in outputs]
        torch.autograd.backward(outputs, gradients)
    return forward


def cases_of(
    op: Op,
    target: str | int,
    *,
    sizes: Iterable[Mapping[str, Any]],
    dtypes: Iterable[torch.dtype],
    special: str = "",
    contender: str = "fused",
    call: Callable[..., Any] | None = None,
) -> list[Case]:
    """Every launch of an op at these sizes, on a device of this target.

    Args:
        op: The op.
        target: Such as ``"sm_90"``.
        sizes: Arguments of ``op.example``.
        dtypes: Of the inputs.
        special: ``"unaligned"`` shifts every tensor by one element; ``"only x"`` leaves ``x`` as
            the one input that wants a gradient.
        contender: Whose launches they are.
        call: What to call in place of ``op.fused``.
    """
    found = []
    with untouched_memory(), torch.enable_grad():
        for dtype in dtypes:
            for size in sizes:
                inputs = hollow(op, dtype, size, offset=int(special == "unaligned"))
                if special.startswith("only "):
                    for name, value in inputs.items():
                        if isinstance(value, Tensor) and value.requires_grad:
                            value.requires_grad_(special == f"only {name}")
                work = op.work(**inputs)
                with capture_launches(target) as capture, hollow_results():
                    rule = getattr(call or op.fused, "dispatch", None)
                    if rule is not None and not rule.takes_kernel((), inputs):
                        continue  # PyTorch takes it there, and would compute it for real
                    forward = _call(call or op.fused, inputs, capture)
                found += [
                    Case(op.name, dtype, size, special, i >= forward, launch, work, contender)
                    for i, launch in enumerate(capture.launches)
                ]
    return found
