"""How a time is taken: events queued around every call, one synchronisation, cold or warm caches.

What goes wrong otherwise, for a kernel of 20 us (simulated in tests/test_bench_timing.py): a host
clock without synchronisation reads 4 us, the launch alone; with the cache flush inside the window,
120 us; with synchronisation before and after each call, 24 us, the launch exposed. Here the device
is held busy while the host queues, so launches are hidden, and the flush lies between the windows.
"""

import math
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], Any]

_WARM_UP = 0.025  # seconds of each contender before the first sample
_MOST = 200  # samples of a contender


class Event(Protocol):
    """A point in a device's queue, as ``torch.cuda.Event`` is."""

    def record(self) -> None:
        """Places it at the end of the queue."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds to a later one."""


class Device(Protocol):
    """What the engine asks of a device; tests give it a simulated one."""

    queued: int  # calls behind one hold

    def now(self) -> float:
        """Seconds on the host's clock."""

    def event(self) -> Event:
        """A new event."""

    def synchronize(self) -> None:
        """Waits until the queue is empty."""

    def flush(self) -> None:
        """Queues work that leaves nothing of the inputs in the caches."""

    def hold(self, seconds: float) -> None:
        """Queues work that keeps the device busy for about this long."""


class CudaDevice:
    """The current CUDA device."""

    queued = 10

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties()
        size = max(256 << 20, 2 * properties.L2_cache_size)
        self._flushed = torch.empty(size // 4, dtype=torch.int32, device="cuda")
        self._clocks_a_second = 1.0e9  # torch.cuda._sleep counts clocks
        self._calibrate()

    def _calibrate(self) -> None:
        clocks = 50_000_000
        torch.cuda._sleep(clocks)
        start, end = self.event(), self.event()
        start.record()
        torch.cuda._sleep(clocks)
        end.record()
        self.synchronize()
        self._clocks_a_second = clocks / (start.elapsed_time(end) * 1e-3)

    def now(self) -> float:
        """Seconds on the host's clock."""
        return time.perf_counter()

    def event(self) -> Event:
        """A new event."""
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        """Waits for every stream."""
        torch.cuda.synchronize()

    def flush(self) -> None:
        """Writes more than the L2 cache holds."""
        self._flushed.zero_()

    def hold(self, seconds: float) -> None:
        """Spins on the device."""
        torch.cuda._sleep(int(seconds * self._clocks_a_second))


@dataclass(frozen=True)
class Timing:
    """Times of one contender.

    Attributes:
        samples: Seconds, each of one call, in the order taken.
        host: Seconds that the host spends on a call, launches included.
    """

    samples: Sequence[float]
    host: float

    def quantile(self, share: float) -> float:
        """Seconds that this share of the samples stays below."""
        ordered = sorted(self.samples)
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    @property
    def median(self) -> float:
        """Seconds."""
        return self.quantile(0.5)

    @property
    def noise(self) -> float:
        """Interquartile range over the median."""
        return (self.quantile(0.75) - self.quantile(0.25)) / self.median if self.median else 0.0


def measure(
    contenders: Mapping[str, Call],
    device: Device,
    *,
    cold: bool = True,
    budget: float = 1.0,
    noise: float = 0.02,
    rounds: int = 3,
) -> dict[str, Timing]:
    """Times calls against each other, in turns, so that a drifting clock meets all alike.

    Args:
        contenders: Calls by name; each queues its work and returns.
        device: Where they run.
        cold: Flush the caches before every call.
        budget: Seconds of the host's clock for all of them together.
        noise: Stop early once every contender's is below this.
        rounds: The least to take, whatever the budget.
    """
    hosts = {name: _warm_up(call, device, budget / 10) for name, call in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    deadline = device.now() + budget
    done = 0
    while done < rounds or device.now() < deadline:
        for name, call in contenders.items():
            samples[name] += _batch(call, device, cold, hosts[name])
        done += 1
        timings = {name: Timing(samples[name], hosts[name]) for name in contenders}
        quiet = all(timing.noise < noise for timing in timings.values())
        if done >= rounds and (quiet or done * device.queued >= _MOST):
            break
    return timings


def _warm_up(call: Call, device: Device, limit: float) -> float:
    """Runs a call until clocks have risen and caches of compiled code are filled.

    Returns:
        Seconds that the host spends on one call.
    """
    call()  # compiles, perhaps for seconds
    device.synchronize()
    deadline = device.now() + min(_WARM_UP, limit)
    hosts = []
    while True:
        start = device.now()
        call()
        hosts.append(device.now() - start)
        device.synchronize()
        if (device.now() >= deadline and len(hosts) >= 3) or len(hosts) >= _MOST:
            return statistics.median(hosts)


def _batch(call: Call, device: Device, cold: bool, host: float) -> list[float]:
    """Seconds of each of several calls, queued while the device is held."""
    starts = [device.event() for _ in range(device.queued)]
    ends = [device.event() for _ in range(device.queued)]
    device.hold(1.5 * device.queued * (host + 40e-6) + 100e-6)  # 40 us: two events and a flush
    for start, end in zip(starts, ends, strict=True):
        if cold:
            device.flush()
        start.record()
        call()
        end.record()
    device.synchronize()
    return [s.elapsed_time(e) * 1e-3 for s, e in zip(starts, ends, strict=True)]


# --- the device's state -------------------------------------------------------------------------

_QUERY = ("clocks.sm", "clocks.max.sm", "clocks_throttle_reasons.active", "temperature.gpu")
_HARMLESS = 0x1 | 0x2  # idle, and clocks set by an application


@dataclass(frozen=True)
class ClockState:
    """What the driver says of the clocks, or None for what it does not say."""

    megahertz: int | None = None
    most_megahertz: int | None = None
    reasons: int | None = None
    celsius: int | None = None

    @property
    def throttled(self) -> bool:
        """Whether power, heat or hardware held the clock back."""
        return bool((self.reasons or 0) & ~_HARMLESS)


def clock_state() -> ClockState:
    """The clocks of the current device now, by nvidia-smi; empty where it does not run."""
    try:
        said = subprocess.run(
            [
                "nvidia-smi",
                f"--id={torch.cuda.current_device()}",
                f"--query-gpu={','.join(_QUERY)}",
                "--format=csv,noheader,nounits",
            ],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ClockState()
    return parse_clock_state(said)


def parse_clock_state(line: str) -> ClockState:
    """Reads a line of nvidia-smi's."""
    values: list[int | None] = []
    for text in line.strip().split(","):
        try:
            values.append(int(text.strip(), 0))
        except ValueError:  # "[N/A]"
            values.append(None)
    return ClockState(*values) if len(values) == len(_QUERY) else ClockState()
