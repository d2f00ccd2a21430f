"""Every kernel launch that real host code makes, recorded with no GPU and compiled for any target.

    with capture_launches("sm90") as capture:
        layer_norm(torch.empty(4096, 4096), (4096,))
    for launch, compiled in capture.compile_all():
        print(launch, resources(compiled))

A stand-in driver answers what host code asks of a device, and Triton's own launcher runs up to the
point where it would compile: arguments are bound and specialised, heuristics and the grid are
evaluated exactly as on a GPU. Nothing is launched, and no output is written. Checked with Triton
3.6 to 3.9; the process must not have TRITON_INTERPRET set.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from fastlm.kernels._dispatch import cpu_runner

from .sass.parse import elf_info

# By compute capability: shared memory a block may use (bytes), and multiprocessors of a usual part.
LIMITS = {
    80: (166912, 108),
    86: (101376, 84),
    89: (101376, 128),
    90: (232448, 132),
    100: (232448, 148),
    120: (101376, 170),
}

# Launch options that a caller may set; the target decides every other compiler option.
_CALLER_OPTIONS = (
    "num_warps",
    "num_ctas",
    "num_stages",
    "maxnreg",
    "enable_fp_fusion",
    "launch_cooperative_grid",
    "launch_pdl",
    "ptx_options",
    "ir_override",
    "debug",
    "sanitize_overflow",
    "instrumentation_mode",
)


def as_target(name: GPUTarget | str | int) -> GPUTarget:
    """A compile target from ``"sm_90"``, ``"sm90"`` or ``90``."""
    if isinstance(name, GPUTarget):
        return name
    digits = str(name).removeprefix("sm").removeprefix("_")
    if not digits.isdigit():
        raise ValueError(f"target: name must be sm_80, sm_90 or alike; got {name!r}")
    return GPUTarget("cuda", int(digits), 32)


@dataclass
class Launch:
    """One call of a kernel, as the launcher specialised it.

    Attributes:
        kernel: The ``@triton.jit`` function.
        signature: Type of each parameter, by name.
        constexprs: Value of each compile-time parameter, by index path.
        attrs: What is known of the others, such as divisibility by 16, by index path.
        options: Launch options that the caller set.
        target: What the host code was told it runs on.
        grid: Programs along x, y and z.
        phase: ``"launch"``, ``"tune"`` (an autotuner's trial) or ``"warmup"``.
        arguments: What the kernel is called with, by name: numbers, and small tables of integers.
    """

    kernel: JITFunction
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    target: GPUTarget
    grid: tuple[int, int, int] | None = None
    phase: str = "launch"
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.fn.__name__

    @property
    def meta(self) -> dict[str, Any]:
        """Compile-time values by parameter name, arguments specialised away included."""
        names = self.kernel.arg_names
        return {names[path[0]]: v for path, v in self.constexprs.items() if len(path) == 1}

    def values(self) -> list[tuple[str, Any]]:
        """Name and value of each parameter of the compiled function; None for what is not kept."""

        def leaves(name: str, kind: Any) -> list[tuple[str, Any]]:
            if isinstance(kind, tuple):
                parts = [leaves(f"{name}.{i}", part) for i, part in enumerate(kind)]
                return [leaf for part in parts for leaf in part]
            return [] if kind == "constexpr" else [(name, self.arguments.get(name))]

        return [leaf for name, kind in self.signature.items() for leaf in leaves(name, kind)]

    def key(self) -> tuple[Any, ...]:
        """Equal for launches that run the same machine code."""
        parts = (self.signature, self.constexprs, self.attrs, self.options)
        return (self.kernel.fn, *map(str, parts))

    def compile(self, target: GPUTarget | str | int | None = None, **override: Any) -> Any:
        """The compiled kernel, for the launch's own target or another; Triton caches it on disk."""
        kind = getattr(self.kernel, "ASTSource", ASTSource)  # set at the first launch: not by peers
        source = kind(self.kernel, dict(self.signature), dict(self.constexprs), dict(self.attrs))
        chosen = self.target if target is None else as_target(target)
        return triton.compile(source, target=chosen, options={**self.options, **override})

    def __str__(self) -> str:
        return f"{self.name}{list(self.grid or ())} {self.phase} {self.meta} {self.options}"


class Capture:
    """The launches of one ``capture_launches`` block, in order."""

    def __init__(self, target: GPUTarget):
        self.target = target
        self.launches: list[Launch] = []
        self.tuning = 0

    def unique(self) -> list[Launch]:
        """One launch for each distinct machine code."""
        return list({launch.key(): launch for launch in reversed(self.launches)}.values())[::-1]

    def compile_all(self, target: GPUTarget | str | int | None = None) -> list[tuple[Launch, Any]]:
        """Each unique launch beside its compiled kernel."""
        return [(launch, launch.compile(target)) for launch in self.unique()]


class _Utils:
    def __init__(self, arch: int):
        self.arch = arch

    def get_device_properties(self, device: Any) -> dict[str, int]:
        shared, multiprocessors = LIMITS.get(self.arch, LIMITS[90])
        return {
            "max_shared_mem": shared,
            "multiprocessor_count": multiprocessors,
            "warpSize": 32,
            "max_num_regs": 65536,
            "sm_clock_rate": 1_000_000,
            "mem_clock_rate": 1_000_000,
            "mem_bus_width": 4096,
        }


class _Driver:
    """Stands in for ``triton.backends.driver.DriverBase``."""

    def __init__(self, target: GPUTarget, capture: Capture):
        self.target = target
        self.capture = capture
        self.utils = _Utils(target.arch)
        self.device = ("capture", id(self))  # unique, so a private entry in every kernel's cache

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> Any:
        return self.device

    def set_current_device(self, device: Any) -> None:
        pass

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return divmod(self.target.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        raise RuntimeError("capture_launches: there is no device")

    def get_empty_cache_for_benchmark(self) -> None:
        pass

    def clear_cache(self, cache: Any) -> None:
        pass

    def get_benchmarker(self) -> Any:
        return self.run_once

    def run_once(self, call: Any, quantiles: Any = None, **_: Any) -> list[float]:
        """Runs an autotuner's trial, which records it, and gives every trial the same time."""
        self.capture.tuning += 1
        try:
            call()
        finally:
            self.capture.tuning -= 1
        return [1.0] * (len(quantiles) if quantiles else 1)


def _is_small_table(value: Any) -> bool:
    """Whether an argument is a tensor of integers on the CPU, short enough to keep and read."""
    if not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex():
        return False
    return value.device.type == "cpu" and value.numel() <= 65536 and value.is_contiguous()


class _Recorded:
    """Stands in for the compiled kernel inside ``JITFunction.run``."""

    function = packed_metadata = None

    def __init__(self, launch: Launch):
        self._launch = launch

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        launch = self._launch
        launch.grid = (int(x), int(y), int(z))
        values = rest[-len(launch.kernel.arg_names) :]
        launch.arguments = {
            name: value
            for name, value in zip(launch.kernel.arg_names, values, strict=True)
            if isinstance(value, (bool, int, float)) or _is_small_table(value)
        }

    def _init_handles(self) -> None:
        pass

    @cached_property
    def _compiled(self) -> Any:
        return self._launch.compile()

    # For host code that sizes a persistent grid by the kernel's registers.
    @property
    def n_regs(self) -> int:
        return resources(self._compiled)["regs"]

    @property
    def n_spills(self) -> int:
        return resources(self._compiled)["spill_stores"]

    @property
    def metadata(self) -> Any:
        return self._compiled.metadata

    @property
    def asm(self) -> Any:
        return self._compiled.asm


@contextmanager
def capture_launches(target: GPUTarget | str | int = "sm90") -> Iterator[Capture]:
    """Records the launches that host code makes inside the block, with CPU tensors.

    Args:
        target: What the host code is told it runs on, and what launches compile for.

    Raises:
        RuntimeError: TRITON_INTERPRET is set.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("capture_launches: TRITON_INTERPRET must not be set")
    target = as_target(target)
    capture = Capture(target)
    stand_in = _Driver(target, capture)
    kernels: dict[int, JITFunction] = {}
    before = JITFunction._do_compile, Autotuner.run, driver._active

    def do_compile(self, key, signature, device, constexprs, options, attrs, warmup):
        kernels[id(self)] = self
        defaults = type(options)()
        chosen = {
            name: getattr(options, name)
            for name in _CALLER_OPTIONS
            if hasattr(options, name) and getattr(options, name) != getattr(defaults, name)
        }
        phase = "warmup" if warmup else "tune" if capture.tuning else "launch"
        launch = Launch(
            self, dict(signature), dict(constexprs), dict(attrs), chosen, target, phase=phase
        )
        capture.launches.append(launch)
        return _Recorded(launch)  # the launcher does not keep it

    def tune(self, *args, **kwargs):
        """Runs the autotuner so that it leaves no made-up timing behind."""
        times, self.cache = self.cache, {}
        keeps, self.cache_results = self.cache_results, False
        own = self.__dict__.pop("do_bench", None)
        self.__dict__["do_bench"] = stand_in.run_once
        try:
            return before[1](self, *args, **kwargs)
        finally:
            self.cache, self.cache_results = times, keeps
            del self.__dict__["do_bench"]
            if own is not None:
                self.__dict__["do_bench"] = own

    JITFunction._do_compile, Autotuner.run = do_compile, tune
    driver.set_active(stand_in)
    try:
        with cpu_runner("compiler"):
            yield capture
    finally:
        JITFunction._do_compile, Autotuner.run, driver._active = before
        for kernel in kernels.values():
            kernel.device_caches.pop(stand_in.device, None)


def resources(compiled: Any) -> dict[str, Any]:
    """Registers a thread, stack, shared and tensor memory, warps, and bytes spilled (ptxas -v)."""
    from triton.backends.nvidia.compiler import get_ptxas

    info = elf_info(compiled.asm["cubin"])
    arch = compiled.metadata.target.arch
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        said = subprocess.run(
            [
                get_ptxas(arch).path,
                "-v",
                "--regAllocOptLevel=2",
                f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}",
                file.name,
                "-o",
                os.devnull,
            ],
            capture_output=True,
            text=True,
        ).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return {
        "regs": info.registers,
        "stack": info.stack,
        "shared": compiled.metadata.shared,
        "tmem": getattr(compiled.metadata, "tmem_size", None),
        "warps": compiled.metadata.num_warps,
        "spill_stores": int(spills[1]) if spills else None,
        "spill_loads": int(spills[2]) if spills else None,
    }


def sass_ops(compiled: Any) -> Counter[str]:
    """How often each machine instruction occurs, modifiers included."""
    from .machine_code import read

    return Counter(read([compiled])[0].opcodes)
