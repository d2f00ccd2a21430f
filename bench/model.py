"""The modelled time of a launch: the cost model on its machine code, and its own loop counts."""

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from triton.runtime.cache import get_cache_manager

from . import sass
from .capture import Launch
from .sass import LoopReport, Report, analyse, predict, traffic_bytes
from .sass.parse import Disassembly
from .ttir import parse
from .turns import trip_counts

ASSUMPTIONS = (
    "the GPU runs the kernel alone at its nominal clock; launch cost is left out",
    "a kernel's loops run as often as its scalar code says, averaged over programs of the grid",
    *sass.ASSUMPTIONS,
)


@functools.cache
def version() -> str:
    """Changes whenever the model of a kernel's machine code does."""
    digest = hashlib.sha256()
    for file in sorted(Path(sass.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def kept_cost(compiled: Any) -> Report | None:
    """The cost model's report that Triton's cache holds of a kernel."""
    kept = get_cache_manager(compiled.hash).get_file(f"fastlm-cost-{version()}.json")
    if kept is None:
        return None
    with open(kept) as file:
        fields = json.load(file)
    return Report(**{**fields, "loops": [LoopReport(**loop) for loop in fields["loops"]]})


def cost(compiled: Any, code: Disassembly | None = None) -> Report:
    """The cost model's report of a compiled kernel, kept beside it in Triton's cache.

    Args:
        compiled: The kernel.
        code: Its instructions, if they are there; they are changed.
    """
    kept = kept_cost(compiled)
    if kept is not None:
        return kept
    metadata = compiled.metadata
    report = analyse(
        compiled.asm["cubin"],
        metadata.target.arch,
        warps=metadata.num_warps,
        shared=metadata.shared,
        stages=metadata.num_stages or 2,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        code=code,
    )
    text = json.dumps(asdict(report))
    get_cache_manager(compiled.hash).put(text, f"fastlm-cost-{version()}.json", binary=False)
    return report


@dataclass(frozen=True)
class Modelled:
    """What the model says of one launch. Nothing of it is measured.

    Attributes:
        microseconds: If the slowest pipe alone counted, as simulated, if nothing overlapped.
        bytes: Of global memory, read and written.
        flops: On the tensor cores or in float32 products.
        bound: The pipe that is busiest, or ``"DRAM"``.
        notes: What the figures rest on here, and the model's warnings.
        guessed: Whether a loop's count was not known, so that the time is but a lower bound.
    """

    microseconds: tuple[float, float, float]
    bytes: float
    flops: float
    bound: str
    notes: tuple[str, ...]
    guessed: bool = False


_SAMPLES = 64
_GOLDEN = (5**0.5 - 1) / 2


def _sample(grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Up to 64 programs that stand for a grid: spread over it, and out of step with its periods.

    A grid of one dimension runs through the tiles of each head in turn, so a step that shares a
    factor with them would meet the same few tiles of every head.
    """
    x, y, z = grid
    size = x * y * z
    taken: Iterable[int] = range(size)
    if size > _SAMPLES:
        step = int(size * _GOLDEN)
        while math.gcd(step, 30 * size) > 1:  # 30: of periods that do not divide the grid
            step += 1
        taken = ((i * step + step // 2) % size for i in range(_SAMPLES))
    return [(i % x, i // x % y, i // (x * y)) for i in taken]


def _mean_turns(launch: Launch, ttir: str) -> tuple[list[float], list[str]]:
    """Turns of each innermost loop in the mean program, and what had to be guessed."""
    kernel = parse(ttir)
    grid = launch.grid or (1, 1, 1)
    programs = _sample(grid)
    values = launch.values()
    counts = [trip_counts(kernel, values, grid, program) for program in programs]
    leaves = [not any(x.loop for x in s.nested()) for s in kernel.loops()]
    turns, notes = [], []
    for i, leaf in enumerate(leaves):
        if not leaf:
            continue
        known = [float(c[i]) for c in counts if c[i] is not None]  # type: ignore[arg-type]
        if len(known) < len(counts):
            notes.append("a loop's count hangs on data: one turn assumed")
        turns.append(sum(known) / len(known) if known else 1.0)
    return turns, notes


def _match(report: Report, turns: list[float]) -> tuple[dict[str, float], list[str]]:
    """Turns of the machine code's loops by name, from those of the source in order."""
    plain = [loop for loop in report.loops if loop.name != "WS"]
    leaves = [
        a
        for a in plain
        if not any(b is not a and a.start <= b.start <= b.end <= a.end for b in plain)
    ]
    if len(plain) < len(report.loops):
        return {"WS": max(turns, default=0.0)}, ["warp-specialised: one loop stands for all"]
    if len(leaves) == len(turns):
        ordered = sorted(leaves, key=lambda loop: loop.start)
        return {loop.name: n for loop, n in zip(ordered, turns, strict=True)}, []
    if not leaves:
        return {}, ["its loops are unrolled"] if turns else []
    note = (
        f"{len(turns)} loops in the source, {len(leaves)} in the machine code: the hot one counts"
    )
    return {report.hot: sum(turns)}, [note]


def model(launch: Launch, ttir: str, report: Report) -> Modelled:
    """The modelled time of one launch, from its machine code's report and its arguments."""
    grid = 1
    for programs in launch.grid or ():
        grid *= programs
    turns, guessed = _mean_turns(launch, ttir)
    by_loop, matched = _match(report, turns)
    times = predict(report, grid, by_loop)
    macs = sum(loop.macs * by_loop.get(loop.name, 0.0) for loop in report.loops)
    hot = report.hot_loop()
    bound = hot.bottleneck if hot else "issue"
    if report.streaming and report.streaming["bound"] == "DRAM":
        bound = "DRAM"
    return Modelled(
        times,
        traffic_bytes(report, grid, by_loop),
        2.0 * macs * grid,
        bound,
        tuple(dict.fromkeys((*guessed, *matched, *report.warnings))),
        bool(guessed),
    )


def roofline(arch: int, work: tuple[int, int], half: bool) -> float:
    """Microseconds that the least bytes and the FLOPs of a call take on the part at its peak."""
    gpu = sass.GPUS[arch]
    bytes_, flops = work
    kind = "f16" if half else "tf32"
    boost = max(1.0, gpu.ceiling.get(kind, gpu.ceiling[""]))  # some parts run above their clock
    peak = 2 * gpu.tensor[kind] * gpu.multiprocessors * gpu.megahertz * 1e6 * boost
    return max(bytes_ / (gpu.dram_gbs * 1e9), flops / peak) * 1e6


def part(arch: int) -> Mapping[str, Any]:
    """The part that stands for a target, and its figures."""
    gpu = sass.GPUS[arch]
    return {
        "name": gpu.name,
        "multiprocessors": gpu.multiprocessors,
        "megahertz": gpu.megahertz,
        "dram_gbs": gpu.dram_gbs,
    }
