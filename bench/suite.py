"""Times every op against its contenders on a GPU, and checks them in the same run."""

import ast
import gc
import inspect
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlm.kernels import OPS, Op

from . import check
from .contenders import Field, contenders, note, versions
from .sass import GPUS
from .static import environment
from .table import in_a_line
from .timing import Call, ClockState, CudaDevice, Device, Timing, clock_state, measure

MODES = ("forward", "backward", "full")
_CEILING = 1.03  # of what the card was measured to do; above it the figure cannot be right
_NOISY = 0.05


class Bench(Device, Protocol):
    """A device that also says where tensors live and how much memory a call takes."""

    place: torch.device
    name: str
    side: int  # of the products that its peaks are measured with

    def peak_bytes(self, call: Call) -> int | None:
        """The most memory that a call holds beyond what is there before it, if that is counted."""

    def clocks(self) -> ClockState:
        """What the driver says of the clocks now."""

    def graphed(self, call: Call) -> Call:
        """A call that replays what this one queues, without its host code."""


class CudaBench(CudaDevice):
    """The current CUDA device and its memory."""

    place = torch.device("cuda")
    side = 8192

    def __init__(self) -> None:
        super().__init__()
        self.name = torch.cuda.get_device_name()

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

    def graphed(self, call: Call) -> Call:
        """A call that replays what this one queues, as a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what a first call compiles or allocates is not captured
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        gc.collect()
        collects = gc.isenabled()
        gc.disable()  # a module unloaded meanwhile would break the capture
        try:
            with torch.cuda.graph(graph):
                kept = call()
        finally:
            if collects:
                gc.enable()

        def replay() -> Any:
            graph.replay()
            return kept

        return replay


@dataclass(frozen=True)
class Peaks:
    """What the card was measured to do at best.

    Attributes:
        bytes: A second, read and written by a large copy.
        flops: A second, of a large product, by dtype.
    """

    bytes: float
    flops: Mapping[str, float]


_HALVES_AND_FLOAT = (torch.bfloat16, torch.float16, torch.float32)


def measured_peaks(device: Bench, dtypes: Iterable[torch.dtype] = _HALVES_AND_FLOAT) -> Peaks:
    """Runs a large copy and large products of PyTorch's."""
    size = device.side
    source = torch.empty(size * size * 2, dtype=torch.float32, device=device.place)
    target = torch.empty_like(source)
    copied = measure({"copy": lambda: target.copy_(source)}, device)["copy"]
    flops = {}
    for dtype in dtypes:
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


def runner(call: Callable[..., Any], inputs: check.Inputs, mode: str) -> Call:
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
        with check.poisoned_memory():
            got = check.outcome(call, check.copies(inputs), backward)
    except torch.OutOfMemoryError:
        return "unchecked: float64 does not fit in memory"
    return check.judge(got, eager, exact, setting.dtype)


def time_setting(
    setting: Setting,
    field: Field,
    device: Bench,
    peaks: Peaks,
    budget: float,
    *,
    graph: bool = False,
    check_only: bool = False,
) -> list[dict[str, Any]]:
    """A row for each contender: its times if it is right before and after, else why not.

    Args:
        setting: The case.
        field: The contenders.
        device: Where to run.
        peaks: What it can do at best.
        budget: Seconds of timing.
        graph: Time replays of a CUDA graph of each call.
        check_only: Check, and time nothing.
    """
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
        missing = _not_taken(call, inputs)
        if missing:
            rows[name] = {**base, "contender": name, "status": "skipped", "reason": missing}
            continue
        try:
            verdicts[name] = _verdict(setting, call, device, seed=1)
            if check_only:
                checked = _verdict_fields(verdicts[name], verdicts[name])
                rows[name] = {**base, "contender": name, **checked}
                continue
            run = runner(call, check.copies(inputs), setting.mode)
            run = device.graphed(run) if graph else run
            run()
            device.synchronize()
            calls[name] = run
        except NotImplementedError as error:
            reason = in_a_line(error).partition(": ")[2]
            rows[name] = {**base, "contender": name, "status": "skipped", "reason": reason}
        except Exception as error:  # a contender that fails must not end the run
            failed = {"status": "failed", "reason": in_a_line(error)}
            rows[name] = {**base, "contender": name, **failed}
    before = device.clocks()
    timings = measure(calls, device, cold=setting.cold, budget=budget) if calls else {}
    throttled = before.throttled or device.clocks().throttled
    for name, timing in timings.items():
        after = _verdict(setting, field.calls[name], device, seed=2)
        row = {**base, "contender": name, **_verdict_fields(verdicts[name], after)}
        row["note"] = note(setting.op, name, inputs)
        if row["status"] == "ok":
            row |= times_of(timing)
            row["peak_bytes"] = device.peak_bytes(calls[name])
            row["flags"] = noise_flags(timing, throttled)
            if setting.mode == "forward":
                row |= _rates(bytes_, flops, timing.median, peaks.bytes, peaks.flops[row["dtype"]])
        rows[name] = row
    skipped = [
        {**base, "contender": name, "status": "skipped", "reason": why}
        for name, why in field.skipped.items()
    ]
    return [*rows.values(), *skipped]


def times_of(timing: Timing) -> dict[str, Any]:
    """The times of a row."""
    return {
        "samples": [round(s, 10) for s in timing.samples],
        "p20": timing.quantile(0.2),
        "p50": timing.median,
        "p80": timing.quantile(0.8),
        "host": timing.host,
    }


def noise_flags(timing: Timing, throttled: bool) -> list[str]:
    """What makes a row's times doubtful."""
    return ["noisy"] * (timing.noise > _NOISY) + ["throttled"] * throttled


def _not_taken(call: Callable[..., Any], inputs: check.Inputs) -> str:
    """Why a contender cannot be called with these arguments at all, or nothing."""
    try:
        inspect.signature(call).bind(**inputs)
    except TypeError as error:
        return f"it has {error}" if "unexpected" not in str(error) else f"{error}"
    except ValueError:  # a builtin without a signature: the call will say
        return ""
    return ""


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
    suite: str,
    ops: Sequence[str] | None,
    modes: Sequence[str],
    dtypes: Sequence[str],
    *,
    sizes: Sequence[Mapping[str, Any]] = (),
    caches: Sequence[str] = (),
) -> Iterator[Setting]:
    """The cases of a suite: ``quick`` takes one size an op, ``full`` all of them, warm as well.

    Args:
        suite: ``"quick"`` or ``"full"``.
        ops: Names; all by default.
        modes: Of ``MODES``.
        dtypes: Names; an op without any of them is taken in its last one.
        sizes: In place of the op's own.
        caches: ``"cold"``, ``"warm"`` or both, in place of the suite's own.
    """
    if not caches:
        caches = ("cold", "warm") if suite == "full" else ("cold",)
    for name in ops or OPS:
        op = OPS[name]
        chosen = sizes or op.bench_sizes
        if suite == "quick" and not sizes:
            chosen = [chosen[len(chosen) // 2]]
        wanted = [d for d in op.dtypes if _name(d) in dtypes] or [op.dtypes[-1]]
        for dtype in wanted:
            for size in chosen:
                for mode in modes:
                    for cache in caches:
                        yield Setting(op, dtype, size, mode, cache == "cold")


def parse_size(text: str) -> dict[str, Any]:
    """A size from ``M=8192,N=4096``.

    Raises:
        ValueError: Not of that form.
    """
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        found = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
        if call.args or not found or len(found) < len(call.keywords):
            raise ValueError("no names")
    except (SyntaxError, ValueError):
        raise ValueError(f"bench: --size must be like M=8192,N=4096; got {text!r}") from None
    return found


def run_suite(
    cases: Sequence[Setting],
    device: Bench,
    *,
    wanted: list[str] | None = None,
    budget: float = 120.0,
    progress: Callable[[str], None] = lambda line: None,
    graph: bool = False,
    check_only: bool = False,
) -> dict[str, Any]:
    """Times the cases, and gives a report ready for JSON.

    Args:
        cases: From ``settings``.
        device: Where to run.
        wanted: Contenders beside ``fused`` and ``eager``; all by default.
        budget: Seconds for all of the timing.
        progress: Told of each case before it runs.
        graph: Time replays of CUDA graphs.
        check_only: Check, and time nothing.
    """
    started = time.perf_counter()
    peaks = Peaks(0.0, {}) if check_only else measured_peaks(device)
    rows: list[dict[str, Any]] = []
    fields: dict[str, Field] = {}
    for n, setting in enumerate(cases, 1):
        progress(f"{n}/{len(cases)} {setting.op.name} {setting.mode} {setting.label}")
        if setting.op.name not in fields:
            fields[setting.op.name] = contenders(setting.op, wanted)
        share = budget / len(cases)
        rows += time_setting(
            setting,
            fields[setting.op.name],
            device,
            peaks,
            share,
            graph=graph,
            check_only=check_only,
        )
    report = timed_report(device, peaks, rows, started)
    report["graph"] = graph
    return report


def timed_report(
    device: Bench, peaks: Peaks, rows: list[dict[str, Any]], started: float
) -> dict[str, Any]:
    """Rows beside what they were measured on, ready for JSON."""
    return {
        "schema": 1,
        "timed": True,
        "environment": {
            **environment(),
            **_hardware(device),
            "device": device.name,
            "contenders": versions(),
        },
        "command": " ".join(["fastlm", *sys.argv[1:]]),
        "peaks": {"bytes": peaks.bytes, "flops": dict(peaks.flops)},
        "seconds": round(time.perf_counter() - started, 1),
        "rows": rows,
    }


def _hardware(device: Bench) -> dict[str, Any]:
    """The card, its driver and its clocks; empty for another device."""
    if device.place.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties()
    state = clock_state()
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "megahertz": state.most_megahertz,
        "sdpa_default": sdpa_default(),
        "datasheet": _datasheet(10 * properties.major + properties.minor),
    }


def _datasheet(capability: int) -> str | None:
    """Peaks of a usual part of this capability, as its maker gives them."""
    gpu = GPUS.get(capability)
    if gpu is None:
        return None
    half = 2 * gpu.tensor["f16"] * gpu.multiprocessors * gpu.megahertz / 1e6
    return f"{gpu.name}: {gpu.dram_gbs} GB/s, {half:.0f} TFLOP/s in half precision"


def _driver() -> str | None:
    from torch.utils.collect_env import get_nvidia_driver_version
    from torch.utils.collect_env import run as shell

    return get_nvidia_driver_version(shell)


def sdpa_default() -> str:
    """The order in which PyTorch's attention tries its backends here."""
    from torch.nn.attention import SDPBackend

    order = torch._C._get_sdp_priority_order()
    return ", ".join(SDPBackend(int(i)).name.lower() for i in order)


def speed_ups(
    rows: Sequence[dict[str, Any]], baseline: str = "eager"
) -> dict[tuple[str, ...], float]:
    """The baseline's time over ours, of each case that has both."""
    return {
        key: times[baseline] / times["fused"]
        for key, times in by_case(rows).items()
        if "fused" in times and baseline in times
    }


def summary(rows: Sequence[dict[str, Any]], baseline: str = "eager") -> dict[str, Any]:
    """Wins and losses against a baseline, and the geometric mean of all ratios."""
    ratios = speed_ups(rows, baseline)
    product = 1.0
    for ratio in ratios.values():
        product *= ratio
    return {
        "cases": len(ratios),
        "wins": sum(ratio > 1 for ratio in ratios.values()),
        "losses": sum(ratio < 1 for ratio in ratios.values()),
        "geometric_mean": product ** (1 / len(ratios)) if ratios else None,
    }


KEY = ("op", "case", "mode", "cache")  # of a case; its rows are contenders


def by_case(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, float]]:
    """Medians of the right contenders, by case and name."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if row["status"] == "ok" and "p50" in row:
            found.setdefault(tuple(row[k] for k in KEY), {})[row["contender"]] = row["p50"]
    return found
