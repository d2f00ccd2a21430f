"""A CPU as a device of the benchmarks: calls return when they are done, and nothing is queued."""

import platform
import time
from pathlib import Path
from typing import Any

import torch

from .timing import Call, ClockState


class _Moment:
    """A point in time."""

    def __init__(self) -> None:
        self._at = 0.0

    def record(self) -> None:
        """Is now."""
        self._at = time.perf_counter()

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds to a later one."""
        return (end._at - self._at) * 1e3


class CpuBench:
    """This machine's CPU, with as many threads as PyTorch has."""

    place = torch.device("cpu")
    side = 2048
    queued = 1

    def __init__(self) -> None:
        threads = torch.get_num_threads()
        self.name = f"{_model_name()}, {threads} thread{'s' * (threads > 1)}"
        self._flushed = torch.empty(64 << 20, dtype=torch.int32)  # more than caches hold

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def event(self) -> _Moment:
        """A new point in time."""
        return _Moment()

    def synchronize(self) -> None:
        """Returns: nothing is ever queued."""

    def flush(self) -> None:
        """Writes more than the caches hold."""
        self._flushed.zero_()

    def hold(self, seconds: float) -> None:
        """Does nothing: there is no queue to fill meanwhile."""

    def peak_bytes(self, call: Call) -> None:
        """PyTorch counts no memory of a CPU."""

    def clocks(self) -> ClockState:
        """Unknown."""
        return ClockState()

    def graphed(self, call: Call) -> Call:
        """The call: a CPU has no graphs."""
        return call


def _model_name() -> str:
    """What the processor calls itself."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
