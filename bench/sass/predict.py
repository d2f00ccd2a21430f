"""The modelled time of a kernel on a whole grid."""

from collections.abc import Mapping

from .gpus import GPUS, LATENCY, Gpu
from .report import Report


def predict(
    report: Report,
    grid: float,
    turns: Mapping[str, float],
    *,
    launch_us: float = 0.0,
    gpu: Gpu | None = None,
) -> tuple[float, float, float]:
    """Modelled microseconds: if the slowest pipe alone counted, simulated, without overlap.

    Args:
        report: Of the kernel.
        grid: Blocks of the launch.
        turns: Of each loop in a block, by its name.
        launch_us: Added for the launch.
        gpu: Default: the one that the report is of.
    """
    gpu = gpu or GPUS[report.arch]
    resident = max(1, report.blocks_per_sm)
    waves = max(1.0, grid / (gpu.multiprocessors * resident))
    loops = [loop for loop in report.loops if turns.get(loop.name)]
    hot = report.hot_loop()
    tensor = hot is not None and hot.macs > 0
    ceiling: float = gpu.ceiling.get(hot.dtype, gpu.ceiling[""]) if hot and tensor else 1
    memory = 0.0
    if report.streaming:
        memory = traffic_bytes(report, grid, turns) / gpu.dram_gbs / 1e3 / gpu.dram_efficiency
    times = []
    for k in range(3):
        cycles: float = report.outside_cycles[k] + LATENCY["launch"] * (k > 0)
        cycles += sum(loop.cycles[k] * turns[loop.name] for loop in loops)
        if hot and tensor and ceiling < 1 and hot.utilisation[k] > ceiling:
            cycles *= hot.utilisation[k] / ceiling
        busy = waves * cycles / gpu.megahertz / max(1, ceiling)
        bound = (max(busy, memory * gpu.dram_efficiency), max(busy, memory), busy + memory)[k]
        times.append(round(launch_us + bound, 2))
    return times[0], times[1], times[2]


def traffic_bytes(report: Report, grid: float, turns: Mapping[str, float]) -> float:
    """Global bytes that a launch reads and writes; what all blocks share counts once."""
    loads, stores, common = report.outside_bytes
    spilled = report.streaming.get("spill_to_dram", 0)
    block: float = loads + stores + (0 if report.hot_loop() else spilled)
    for loop in report.loops:
        extra = spilled if loop.name == report.hot else 0
        block += (loop.load_bytes + loop.store_bytes + extra) * turns.get(loop.name, 0)
    return block * grid + common
