"""A kernel that is launched at every step with arguments of the same kinds."""

from collections.abc import Callable
from typing import Any

from triton.compiler import CompiledKernel


class Repeated:
    """One specialisation of a kernel: the first launch finds it, and later ones do not look again.

    Finding it takes Triton 3.7 several times as long as launching it. All launches must be alike
    in what Triton specialises for: types, what is None, integers, and alignment of pointers.

    Args:
        kernel: A ``@triton.jit`` function.
        programs: Of a launch.
        constants: Its compile-time arguments, which stand behind all others, and launch options.
    """

    def __init__(self, kernel: Any, programs: int, **constants: Any):
        self.kernel, self.programs, self.constants = kernel, programs, constants
        self.launch: Callable[..., None] | None = None
        self.rest: tuple[Any, ...] = ()

    def __call__(self, *args: Any) -> None:
        """Launches the kernel with these arguments before the constants."""
        if self.launch is not None and not self.kernel.pre_run_hooks:
            self.launch(*args, *self.rest)
            return
        found = self.kernel[(self.programs,)](*args, **self.constants)
        if isinstance(found, CompiledKernel):  # the interpreter gives None
            names = self.kernel.arg_names[len(args) :]
            self.rest = tuple(self.constants[name] for name in names)
            self.launch = found[(self.programs, 1, 1)]
