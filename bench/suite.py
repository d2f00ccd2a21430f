"""Times every op against its contenders on a GPU, and checks them in the same run."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlm.kernels import OPS, Op

from . import check
from .contenders import Field, contenders, versions
from .static import environment
from .timing import Call, ClockState, CudaDevice, Device, clock_state, measure

MODES = ("forward", "backward", "full")
_CEILING = 1.03  # of what the card was measured to do; above it the figure cannot be right
_NOISY = 0.05


class Bench(Device, Protocol):
    """A device that also says where tensors live and how much memory a call takes."""

    place: torch.device

    def peak_bytes(self, call: Call) -> int:
        """The most memory that a call holds beyond what is there before it."""

    def clocks(self) -> ClockState:
        """What the driver says of the clocks now."""


class CudaBench(CudaDevice):
    """The current CUDA device and its memory."""

    place = torch.device("cuda")

    def peak_bytes(self, call: Call) -> int:
        """The most memory that a call holds beyond what is there before it."""
        self.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def clocks(self) -> ClockState:
        """What the driver says of the clocks now."""
        return clock_state()


@dataclass(frozen=True)
class Peaks:
    """What the card was measured to do at best.

    Attributes:
        bytes: A second, read and written by a large copy.
        flops: A second, of a large product, by dtype.
    """

    bytes: float
    flops: Mapping[str, float]


def measured_peaks(device: Bench, size: int = 8192) -> Peaks:
    """Runs a large copy and large products of PyTorch's."""
    source = torch.empty(size * size * 2, dtype=torch.float32, device=device.place)
    target = torch.empty_like(source)
    copied = measure({"copy": lambda: target.copy_(source)}, device)["copy"]
    flops = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(size, size, device=device.place).to(dtype) for _ in range(2))

        def product(a: Tensor = a, b: Tensor = b) -> Tensor:
            return a @ b

        timing = measure({"product": product}, device, cold=False)["product"]
        flops[_name(dtype)] = 2 * size**3 / timing.median
    return Peaks(2 * source.nbytes / copied.median, flops)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- one case -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One op at one size, dtype and mode."""

    op: Op
    dtype: torch.dtype
    size: Mapping[str, Any]
    mode: str = "forward"
    cold: bool = True

    @property
    def label(self) -> str:
        """In words: ``bfloat16 M=8192 N=4096``."""
        return " ".join([_name(self.dtype), *(f"{k}={v}" for k, v in self.size.items())])


def _runner(call: Callable[..., Any], inputs: check.Inputs, mode: str) -> Call:
    """The call to time: forward, backward of one kept graph, or both."""
    wanted = [t for t in check.tensors(inputs) if t.requires_grad]
    if mode == "forward":
        return lambda: call(**inputs)
    outputs = [t for t in check.tensors(call(**inputs)) if t.requires_grad]
    gradients = [torch.randn_like(t) for t in outputs]
    if mode == "backward":
        return lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)

    def full() -> Any:
        results = [t for t in check.tensors(call(**inputs)) if t.requires_grad]
        return torch.autograd.grad(results, wanted, gradients)

    return full


def _verdict(
    setting: Setting, call: Callable[..., Any], device: Bench, seed: int
) -> check.Verdict | str:
    """How right a contender is on new inputs, or why that could not be found out."""
    torch.manual_seed(seed)
    inputs = setting.op.example(setting.dtype, device.place, **setting.size)
    backward = setting.mode != "forward"
    try:
        exact = check.outcome(setting.op.reference, check.copies(inputs, torch.float64), backward)
        eager = check.outcome(setting.op.reference, check.copies(inputs), backward)
        got = check.outcome(call, check.copies(inputs), backward)
    except torch.OutOfMemoryError:
        return "unchecked: float64 does not fit in memory"
    return check.judge(got, eager, exact, setting.dtype)


def time_setting(
    setting: Setting, field: Field, device: Bench, peaks: Peaks, budget: float
) -> list[dict[str, Any]]:
    """A row for each contender: its times if it is right before and after, else why not."""
    torch.manual_seed(0)
    base = {
        "op": setting.op.name,
        "case": setting.label,
        "size": {k: str(v).removeprefix("torch.") for k, v in setting.size.items()},
        "dtype": _name(setting.dtype),
        "mode": setting.mode,
        "cache": "cold" if setting.cold else "warm",
    }
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    verdicts: dict[str, check.Verdict | str] = {}
    inputs = setting.op.example(setting.dtype, device.place, **setting.size)
    bytes_, flops = setting.op.work(**inputs)
    for name, call in field.calls.items():
        try:
            verdicts[name] = _verdict(setting, call, device, seed=1)
            runner = _runner(call, check.copies(inputs), setting.mode)
            runner()
            device.synchronize()
            calls[name] = runner
        except Exception as error:  # a contender that fails must not end the run
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            rows[name] = {**base, "contender": name, "status": "failed", "reason": reason}
    before = device.clocks()
    timings = measure(calls, device, cold=setting.cold, budget=budget) if calls else {}
    throttled = before.throttled or device.clocks().throttled
    for name, timing in timings.items():
        after = _verdict(setting, field.calls[name], device, seed=2)
        row = {**base, "contender": name, **_verdict_fields(verdicts[name], after)}
        if row["status"] == "ok":
            row |= {
                "samples": [round(s, 10) for s in timing.samples],
                "p20": timing.quantile(0.2),
                "p50": timing.median,
                "p80": timing.quantile(0.8),
                "host": timing.host,
                "peak_bytes": device.peak_bytes(calls[name]),
                "flags": ["noisy"] * (timing.noise > _NOISY) + ["throttled"] * throttled,
            }
            if setting.mode == "forward":
                row |= _rates(bytes_, flops, timing.median, peaks.bytes, peaks.flops[row["dtype"]])
        rows[name] = row
    skipped = [
        {**base, "contender": name, "status": "skipped", "reason": why}
        for name, why in field.skipped.items()
    ]
    return [*rows.values(), *skipped]


def _verdict_fields(before: check.Verdict | str, after: check.Verdict | str) -> dict[str, Any]:
    """Status, errors and reason; a failed check hides the time."""
    if isinstance(before, str) or isinstance(after, str):
        why = before if isinstance(before, str) else after
        return {"status": "ok", "reason": why, "error": None, "error_eager": None}
    wrong = f"before timing: {before.wrong}" if before.wrong else ""
    if not wrong and after.wrong:
        wrong = f"after timing: {after.wrong}"
    return {
        "status": "wrong" if wrong else "ok",
        "reason": wrong,
        "error": max(before.error, after.error),
        "error_eager": max(before.eager, after.eager),
    }


def _rates(
    bytes_: int, flops: int, seconds: float, peak_bytes: float, peak_flops: float
) -> dict[str, Any]:
    """Rates of the least work, and the share of the measured roofline; over 103 % is invalid."""
    share = max(bytes_ / peak_bytes, flops / peak_flops) / seconds
    row: dict[str, Any] = {
        "bytes": bytes_,
        "flops": flops,
        "gbs": bytes_ / seconds / 1e9,
        "tflops": flops / seconds / 1e12,
        "roofline": share,
    }
    if share > _CEILING:
        reason = f"{share:.0%} of what the card was measured to do: the work was not done"
        row |= {"status": "invalid", "reason": reason}
    return row


# --- a run --------------------------------------------------------------------------------------


def settings(
    suite: str, ops: Sequence[str] | None, modes: Sequence[str], dtypes: Sequence[str]
) -> Iterator[Setting]:
    """The cases of a suite: ``quick`` takes one size an op, ``full`` all of them, warm as well."""
    for name in ops or OPS:
        op = OPS[name]
        sizes = op.bench_sizes
        if suite == "quick":
            sizes = [sizes[len(sizes) // 2]]
        for dtype in op.dtypes:
            if _name(dtype) not in dtypes:
                continue
            for size in sizes:
                for mode in modes:
                    yield Setting(op, dtype, size, mode)
                    if suite == "full":
                        yield Setting(op, dtype, size, mode, cold=False)


def run_suite(
    cases: Sequence[Setting],
    device: Bench,
    *,
    wanted: list[str] | None = None,
    budget: float = 120.0,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Times the cases, and gives a report ready for JSON.

    Args:
        cases: From ``settings``.
        device: Where to run.
        wanted: Contenders beside ``fused`` and ``eager``; all by default.
        budget: Seconds for all of the timing.
        progress: Told of each case before it runs.
    """
    started = time.perf_counter()
    peaks = measured_peaks(device)
    rows: list[dict[str, Any]] = []
    fields: dict[str, Field] = {}
    for n, setting in enumerate(cases, 1):
        progress(f"{n}/{len(cases)} {setting.op.name} {setting.mode} {setting.label}")
        if setting.op.name not in fields:
            fields[setting.op.name] = contenders(setting.op, wanted)
        share = budget / len(cases)
        rows += time_setting(setting, fields[setting.op.name], device, peaks, share)
    return {
        "schema": 1,
        "timed": True,
        "environment": {**environment(), **_hardware(), "contenders": versions()},
        "command": " ".join(["fastlm", *sys.argv[1:]]),
        "peaks": {"bytes": peaks.bytes, "flops": dict(peaks.flops)},
        "seconds": round(time.perf_counter() - started, 1),
        "rows": rows,
    }


def _hardware() -> dict[str, Any]:
    """The card, its driver and its clocks; empty where there is none."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties()
    state = clock_state()
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "megahertz": state.most_megahertz,
        "sdpa_default": sdpa_default(),
    }


def _driver() -> str | None:
    from torch.utils.collect_env import get_nvidia_driver_version
    from torch.utils.collect_env import run as shell

    return get_nvidia_driver_version(shell)


def sdpa_default() -> str:
    """The order in which PyTorch's attention tries its backends here."""
    from torch.nn.attention import SDPBackend

    order = torch._C._get_sdp_priority_order()
    return ", ".join(SDPBackend(int(i)).name.lower() for i in order)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Wins and losses against eager, and the geometric mean of the ratios, losses included."""
    ratios = {}
    for key, times in by_case(rows).items():
        if "fused" in times and "eager" in times:
            ratios[key] = times["eager"] / times["fused"]
    product = 1.0
    for ratio in ratios.values():
        product *= ratio
    return {
        "cases": len(ratios),
        "wins": sum(ratio > 1 for ratio in ratios.values()),
        "losses": sum(ratio < 1 for ratio in ratios.values()),
        "geometric_mean": product ** (1 / len(ratios)) if ratios else None,
    }


def by_case(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, float]]:
    """Medians of the right contenders, by case and name."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if row["status"] == "ok" and "p50" in row:
            key = tuple(row[k] for k in ("op", "case", "mode", "cache"))
            found.setdefault(key, {})[row["contender"]] = row["p50"]
    return found
