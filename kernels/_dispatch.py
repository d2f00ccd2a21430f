"""Which code runs a call: the Triton kernel, or PyTorch's own op.

| tensors live on                                          | runs                           |
|----------------------------------------------------------|--------------------------------|
| an NVIDIA GPU of compute capability 8.0 or more          | the Triton kernel              |
| the CPU, under TRITON_INTERPRET=1                        | the Triton kernel, interpreted |
| the CPU otherwise, or an input the kernel does not cover | PyTorch                        |

``backend("triton")`` takes the kernel whatever the device and raises where nothing can run it;
``backend("torch")`` never takes it. ``FASTLM_BACKEND`` sets the same for a whole program.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import torch
import triton
from torch import Tensor
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")
Backend = Literal["auto", "triton", "torch"]


def _checked(name: str, source: str) -> Backend:
    if name not in get_args(Backend):
        raise ValueError(f"{source} must be one of {', '.join(get_args(Backend))}; got {name!r}")
    return name  # type: ignore[return-value]


# What CPU tensors run on when a kernel is wanted: the interpreter, or a driver that only compiles.
CpuRunner = Literal["interpreter", "compiler"] | None

_backend: Backend = _checked(os.environ.get("FASTLM_BACKEND", "auto"), "FASTLM_BACKEND")
_cpu_runner: CpuRunner = "interpreter" if triton.knobs.runtime.interpret else None


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Chooses the code that ops run inside the block: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: Another name.
    """
    global _backend
    before, _backend = _backend, _checked(name, "backend: name")
    try:
        yield
    finally:
        _backend = before


@contextmanager
def cpu_runner(runner: CpuRunner) -> Iterator[None]:
    """Says what runs a kernel on CPU tensors inside the block; for the interpreter and capture."""
    global _cpu_runner
    before, _cpu_runner = _cpu_runner, runner
    try:
        yield
    finally:
        _cpu_runner = before


@functools.cache
def _too_old(device_index: int | None) -> str | None:
    major, minor = torch.cuda.get_device_capability(device_index)
    if torch.version.hip or major < 8:
        name = torch.cuda.get_device_name(device_index)
        return f"{name} ({major}.{minor}) is not an NVIDIA GPU of compute capability 8.0 or more"
    return None


def nowhere_to_run(tensor: Tensor) -> str | None:
    """Why no Triton kernel can run on this tensor's device now, or None."""
    if tensor.is_cuda:
        return _too_old(tensor.device.index)
    if tensor.device.type == "cpu":
        return None if _cpu_runner else "the tensors are on the CPU and TRITON_INTERPRET is not set"
    return f"the tensors are on {tensor.device}"


def _foreign(tensors: list[Tensor]) -> str | None:
    """Why PyTorch must take tensors that carry more than data: DTensor, dual, functorch, sparse."""
    for t in tensors:
        if type(t).__name__ == "DTensor":
            return "a DTensor: PyTorch's op knows how to shard it"
        if t.layout is not torch.strided:
            return f"a tensor of layout {t.layout}"
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            return "inside a torch.func transform"
        if forward_ad._current_level >= 0:
            return "inside forward-mode differentiation"
    return None


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments, and in lists among them."""
    found = []
    for arg in (*args, *kwargs.values()):
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            found += [t for t in arg if isinstance(t, Tensor)]
    return found


def _refusal(call: "Dispatched", args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why the kernel does not take this call whatever the backend, or None."""
    tensors = _tensors(args, kwargs)
    if not tensors:
        return "no tensor among the arguments"
    return nowhere_to_run(tensors[0]) or _foreign(tensors) or call.uncovered(*args, **kwargs)


class Dispatched:
    """The rule attached to a public function: its fallback, and what its kernel leaves to it."""

    def __init__(self, name: str, eager: Callable[..., Any], uncovered: Callable[..., str | None]):
        self.name, self.eager, self.uncovered = name, eager, uncovered

    def takes_kernel(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the kernel runs this call; raises where ``"triton"`` was demanded in vain."""
        if _backend == "torch":
            return False
        reason = _refusal(self, args, kwargs)
        if reason is not None and _backend == "triton":
            raise RuntimeError(f'{self.name}: backend "triton" cannot run this call: {reason}')
        return reason is None


def dispatched(
    *, eager: Callable[..., Any], uncovered: Callable[..., str | None]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates the kernel path of an op, so that a call takes it or ``eager`` by the rule above.

    Args:
        eager: PyTorch's op, of the same signature.
        uncovered: The same signature; says why the kernel does not cover a call, or gives None.
    """

    def decorate(kernel: Callable[P, R]) -> Callable[P, R]:
        rule = Dispatched(kernel.__name__, eager, uncovered)

        @functools.wraps(kernel)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if (
                _backend == "auto" and _cpu_runner is None and args
            ):  # the CPU's way out, in a moment
                first = args[0]
                if isinstance(first, Tensor) and not first.is_cuda:
                    return eager(*args, **kwargs)
            if rule.takes_kernel(args, kwargs):
                return kernel(*args, **kwargs)
            return eager(*args, **kwargs)

        call.dispatch = rule  # type: ignore[attr-defined]
        return call

    return decorate


def explain(op: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> str:
    """Says in one sentence which code ``op(*args, **kwargs)`` would run, and why.

    Args:
        op: A function of ``fastlm.kernels``, or its name.
        args: The arguments of the call.
        kwargs: The keyword arguments of the call.

    Raises:
        ValueError: Not a function that chooses between a kernel and PyTorch.
    """
    if isinstance(op, str):
        op = getattr(sys.modules[__package__], op, op)
    rule = getattr(op, "dispatch", None)
    if not isinstance(rule, Dispatched):
        raise ValueError(
            f"explain: op must be a function of fastlm.kernels or its name; got {op!r}"
        )
    if _backend == "torch":
        return f'{rule.name} runs PyTorch: the backend is "torch".'
    reason = _refusal(rule, args, kwargs)
    if reason is None:
        how = f"{_cpu_runner}" if not _tensors(args, kwargs)[0].is_cuda else "GPU"
        return f"{rule.name} runs its Triton kernel on the {how}."
    if _backend == "triton":
        return f'{rule.name} raises: the backend is "triton" but {reason}.'
    return f"{rule.name} runs PyTorch: {reason}."
