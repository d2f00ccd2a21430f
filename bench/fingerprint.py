"""One hash of all that fixes a launch's machine code and its modelled time.

The compiler is a function of the kernel's source, how the launch specialises it, and its own
version; the model is a function of the machine code, the grid and the arguments. Where the hash is
that of a committed row, the row's figures hold, and nothing need be compiled to know it.
"""

import functools
import hashlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from . import model, sass, ttir, turns
from .capture import Launch


@functools.cache
def model_version() -> str:
    """Changes whenever the code that models a time does."""
    files = [*sorted(Path(sass.__file__).parent.glob("*.py"))]
    files += [Path(str(module.__file__)) for module in (model, ttir, turns)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


@functools.cache
def _source(kernel: JITFunction) -> str:
    """Hash of the text of a kernel, of every kernel it calls and of the constants it reads.

    Triton's own key holds line numbers too, which change with a comment elsewhere in the file.
    """
    digest = hashlib.sha256()
    todo, seen = [kernel], {kernel}
    while todo:
        function = todo.pop()
        digest.update(function.src.encode())
        names = function.fn.__code__.co_names
        found = {name: function.fn.__globals__.get(name) for name in names}
        for module in [value for value in found.values() if isinstance(value, ModuleType)]:
            if not module.__name__.startswith(("triton", "torch")):
                found |= {name: vars(module)[name] for name in names if name in vars(module)}
        for name, value in sorted(found.items()):
            if isinstance(value, JITFunction):
                if not value.__module__.startswith("triton") and value not in seen:
                    seen.add(value)
                    todo.append(value)
            elif isinstance(value, tl.constexpr):
                digest.update(f"{name}={value.value}".encode())
    return digest.hexdigest()


def _plain(value: Any) -> str:
    """A value in words that are the same in every process."""
    if isinstance(value, JITFunction):
        return _source(value)
    if isinstance(value, torch.Tensor):
        if value.dtype != torch.int32:  # indices and addresses, on which no loop count hangs
            return str(tuple(value.shape))
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    return repr(value)


def fingerprint(launch: Launch, arch: int) -> str:
    """The hash of a launch on a target of this compute capability."""
    parts = [
        triton.__version__,
        model_version(),
        str(arch),
        _source(launch.kernel),
        str(launch.signature),
        *(f"{path}={_plain(value)}" for path, value in launch.constexprs.items()),
        str(launch.attrs),
        str(sorted(launch.options.items())),
        str(launch.grid),
        *(f"{name}={_plain(value)}" for name, value in launch.arguments.items()),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
