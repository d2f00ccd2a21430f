"""pytest-benchmark with times from the device's own clock: ``pytest bench/ --benchmark-enable``.

The engine of ``timing.py`` takes the samples; a timer that replays them hands them to
pytest-benchmark, so groups, JSON, ``--benchmark-compare`` and ``--benchmark-compare-fail`` work on
the same numbers as ``fastlm bench run``. With no GPU the benchmarks that need one are skipped:
no time is ever made up.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastlm.bench.contenders import Field
from fastlm.bench.suite import Bench, CudaBench, Peaks, Setting, measured_peaks, time_setting


class ReplayTimer:
    """A clock that reads 0, then the next sample, then 0 again."""

    __name__ = "cuda_event"  # what the JSON calls it

    def __init__(self) -> None:
        self.samples: list[float] = []
        self._running = False

    def __call__(self) -> float:
        """The next reading."""
        self._running = not self._running
        return 0.0 if self._running else self.samples.pop(0)


_replay = ReplayTimer()


def make_device() -> Bench | None:
    """The GPU, or None; the tests of this file put a simulated one in its place."""
    return CudaBench() if torch.cuda.is_available() else None


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Gives benchmarks of the GPU the replaying timer, and groups them by case."""
    for item in items:
        if "gpu_bench" in getattr(item, "fixturenames", ()):
            group = item.callspec.params.get("case") if hasattr(item, "callspec") else None
            item.add_marker(pytest.mark.benchmark(timer=_replay, group=group))


@pytest.fixture(scope="session")
def device() -> Bench:
    """The GPU; without one the benchmark is skipped."""
    found = make_device()
    if found is None:
        pytest.skip("no CUDA device: nothing was timed")
    return found


@pytest.fixture(scope="session")
def peaks(device: Bench) -> Peaks:
    """What the card was measured to do."""
    return measured_peaks(device)


@pytest.fixture
def gpu_bench(benchmark: Any, device: Bench, peaks: Peaks) -> Callable[..., None]:
    """Times one contender in one setting, and fails where it is wrong."""

    def run(setting: Setting, name: str, call: Callable[..., Any], budget: float = 1.0) -> None:
        (row,) = time_setting(setting, Field({name: call}), device, peaks, budget)
        if row["status"] != "ok":
            pytest.fail(f"{row['status']}: {row['reason']}")
        _replay.samples = list(row["samples"])
        kept = ("gbs", "tflops", "roofline", "peak_bytes", "host", "error", "error_eager", "flags")
        benchmark.extra_info.update({k: row[k] for k in kept if k in row})
        rounds = len(row["samples"])
        benchmark.pedantic(lambda: None, rounds=rounds, iterations=1, warmup_rounds=0)

    return run


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Notes the card."""
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()


def pytest_benchmark_compare_machine_info(
    config: Any, benchmarksession: Any, machine_info: Any, compared_benchmark: Any
) -> None:
    """Refuses to compare two cards."""
    before, now = compared_benchmark["machine_info"].get("gpu"), machine_info.get("gpu")
    if before != now:
        raise pytest.UsageError(f"refusing to compare a run on {now} with one on {before}")


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """Rates, for which pytest-benchmark's own table has no column."""
    session = getattr(config, "_benchmarksession", None)
    for bench in getattr(session, "benchmarks", ()):
        if bench.extra_info.get("gbs") is not None:
            info = bench.extra_info
            terminalreporter.write_line(
                f"{bench.name:60s} {bench.stats.median * 1e6:9.2f} us {info['gbs']:7.0f} GB/s "
                f"{info['tflops']:7.1f} TFLOP/s {info['roofline']:5.0%} of the roofline"
            )
