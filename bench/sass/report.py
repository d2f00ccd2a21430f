"""The modelled report of one kernel: its loops, bounds, traffic and warnings."""

import math
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from .control_flow import Code, Path
from .cost import GLOBAL, LISTED, MEMORY, SHARED, SPILLS, TENSOR, classify, width
from .gpus import ASSUMPTIONS, GPUS, LATENCY, Gpu
from .lanes import lane_model
from .parse import Disassembly, Instruction, disassemble, elf_info
from .simulate import simulate


@dataclass
class LoopReport:
    """One loop. Bytes, multiply-adds and clocks are of one turn.

    Attributes:
        name: ``L0``, ``L1`` and on in order; ``WS`` for the roles of a specialised kernel together.
        start: Offset of its first instruction.
        end: Offset of its last.
        depth: Loops around it.
        instructions: On its path, a warp.
        stalls: Clocks that the compiler's own stall counts add up to.
        demand: Clocks of each pipe for all resident blocks.
        bottleneck: The pipe in most demand.
        macs: Multiply-adds of a block.
        dtype: Kind of the operands.
        utilisation: Of the peak: if the slowest pipe alone counted, simulated, without overlap.
        cycles: The same three.
        tflops: The same three, under the measured ceiling.
        spill_bytes: Of a block.
        load_bytes: Of a block.
        store_bytes: Of a block.
        useful_bytes: Of a block, those that lanes ask for.
        tma_copies: Instructions.
        step: The loop counter, where it shows.
        notes: Warnings.
    """

    name: str
    start: int
    end: int
    depth: int
    instructions: int
    stalls: int
    demand: dict[str, float]
    bottleneck: str
    macs: int
    dtype: str
    utilisation: list[float]
    cycles: list[float]
    tflops: list[float]
    spill_bytes: int
    load_bytes: int
    store_bytes: int
    useful_bytes: int
    tma_copies: int
    step: str
    notes: list[str]


@dataclass
class Report:
    """What the model says of one kernel on one part. Nothing of it is measured.

    Attributes:
        kernel: Its name.
        gpu: The part.
        arch: Its compute capability.
        warps: A block.
        registers: A thread.
        stack: Bytes a thread.
        spills: Instructions.
        shared: Bytes a block.
        blocks_per_sm: Resident.
        occupancy: Share of the threads that a multiprocessor holds.
        limiter: Of the occupancy.
        instructions: That control flow reaches.
        mix: Instructions by kind.
        forms: Memory, tensor and other listed instructions by name.
        loops: That do work.
        hot: Name of the loop that matters most, or empty.
        outside_cycles: Of the code outside loops; three bounds, as a loop's.
        outside_bytes: Loaded and stored by a block outside loops, and loaded alike by all blocks.
        bytes_per_access: Useful bytes of a warp's global access, in the mean.
        streaming: Of a kernel bound by memory: rates and bytes; empty for others.
        warnings: What is likely wrong.
        assumptions: That the figures rest on.
    """

    kernel: str
    gpu: str
    arch: int
    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    blocks_per_sm: int
    occupancy: float
    limiter: str
    instructions: int
    mix: dict[str, int]
    forms: dict[str, int]
    loops: list[LoopReport]
    hot: str
    outside_cycles: list[int]
    outside_bytes: list[int]
    bytes_per_access: float
    streaming: dict[str, Any]
    warnings: list[str]
    assumptions: list[str]

    def hot_loop(self) -> LoopReport | None:
        """The loop that matters most."""
        return next((loop for loop in self.loops if loop.name == self.hot), None)


def occupancy(
    gpu: Gpu, registers: int, shared: int, warps: int, tensor_memory: int
) -> tuple[int, str]:
    """Blocks that fit on a multiprocessor, and what limits them.

    Args:
        gpu: The part.
        registers: A thread.
        shared: Bytes a block.
        warps: A block.
        tensor_memory: Columns a block.
    """
    held = gpu.registers // 4 // (math.ceil(max(registers, 1) / 8) * 256)  # warps a sub-partition
    limits = {
        "registers": held // (warps // 4) if warps >= 4 else held * 4 // warps,
        "shared memory": gpu.shared_kib * 1024 // (shared + 1024),
        "threads": gpu.threads // (32 * warps),
        "block slots": gpu.blocks,
        "tensor memory": 512 // tensor_memory if tensor_memory else 99,
    }
    limiter = min(limits, key=lambda name: limits[name])
    return max(0, limits[limiter]), limiter


# --- one path -----------------------------------------------------------------------------------


def _demand(path: Path, warps: int) -> dict[str, float]:
    """Clocks of each pipe of a sub-partition for one block."""
    demand: dict[str, float] = defaultdict(float)
    for i, elected in path:
        if i.kind == "off":
            continue
        share = 1.0 if i.once_a_block or elected else warps / 4
        demand["issue"] += share
        for pipe, clocks in i.pipes.items():
            demand[pipe] += clocks * share
    return demand


def _traffic(
    path: Path, kinds: Collection[str], warps: int, *, common: bool = False, useful: bool = False
) -> int:
    """Bytes that one block moves.

    Args:
        path: Of instructions.
        kinds: That count.
        warps: A block.
        common: Only loads whose address is the same for all blocks, which L2 serves but once.
        useful: Bytes that lanes ask for, not the sectors that come.
    """
    total = 0.0
    for i, _ in path:
        if i.kind not in kinds:
            continue
        of_block = bool(i.varies & 2)
        if i.kind in ("load", "copy") and of_block == common:
            continue
        one_sector = not i.varies & 1
        total += 32 if one_sector else i.bytes * (1 if useful else i.misses) * warps
    return int(total)


def _counter(path: Path) -> str:
    """The loop counter's step and bound, where they show."""
    for i, _ in reversed(path):
        match = re.match(r"U?P\d, U?PT, (U?R\d+), (\S+),", i.operands)
        if i.base not in ("ISETP", "UISETP") or not match:
            continue
        for register, bound in ((match[1], match[2]), (match[2], match[1])):
            for j, _ in path:
                step = re.match(r"(U?R\d+), (?:U?PT, U?PT, )?(U?R\d+), (-?0x[0-9a-f]+)", j.operands)
                if step and "IADD" in j.base and step[1] == step[2] == register:
                    return f"{register} += {step[3]}, bound {bound}"
    return ""


# --- a kernel -----------------------------------------------------------------------------------


class _Kernel:
    """A kernel under analysis: its code, what is resident, and where spills live."""

    def __init__(
        self,
        cubin: bytes,
        code: Disassembly,
        gpu: Gpu,
        warps: int,
        shared: int,
        stages: int,
        tensor_memory: int,
    ):
        instructions, labels = code
        info = elf_info(cubin)
        self.gpu, self.info, self.stages = gpu, info, stages
        self.warps = info.threads // 32 or warps or 4
        self.shared = shared if shared >= 0 else info.shared
        self.warnings: list[str] = []
        if shared < 0:
            self.warnings.append("dynamic shared memory unknown: occupancy is an upper bound")
        classify(instructions, gpu)
        self.code = Code(instructions, labels)
        lane_model(self.code)
        self.resident, self.limiter = occupancy(
            gpu, info.registers, self.shared, self.warps, tensor_memory
        )
        self.blocks = max(1, self.resident)
        footprint = info.stack * 32 * self.warps * self.blocks
        past_l2 = footprint * gpu.multiprocessors > gpu.l2_mib << 20
        self.spill_level = (footprint > 131072) + past_l2
        classify(self.code.live, gpu, self.spill_level)  # again, with replays and spills known
        if not self.resident:
            self.warnings.append(f"does not fit on a multiprocessor: limited by {self.limiter}")
        self.tensor = any(i.macs for i in self.code.live)
        self.specialised = self.tensor and any(
            i.base in ("USETMAXREG", "BRX") for i in self.code.live
        )

    def loops(self) -> list[LoopReport]:
        """Every loop that does work, and the roles of a specialised kernel together."""
        heads = sorted(self.code.loops, key=lambda head: self.code.spans[head][0])
        found = [self._loop(f"L{n}", head) for n, head in enumerate(heads)]
        leaves = [a for a in found if a.macs or not any(_encloses(a, b) for b in found)]
        if self.specialised and len(leaves) > 1:
            found.append(self._roles(leaves))
        return found

    def _role_warps(self, path: Path) -> int:
        """Warps that run a partition of a specialised kernel."""
        counts = [
            int(match[1], 16) // 32
            for i, _ in path
            if i.base == "BAR" and (match := re.search(r", (0x[0-9a-f]+)", i.operands))
        ]
        if counts:
            return min(counts)
        return 1 if any(i.kind in ("tcgen05", "tma load") for i, _ in path) else 4

    def _loop(self, name: str, head: int) -> LoopReport:
        code, gpu = self.code, self.gpu
        body = code.loops[head]
        inner = {h: b for h, b in code.loops.items() if b < body}
        path = code.walk(body, head, inner)
        warps = self._role_warps(path) if self.specialised else self.warps
        products = [1 + (i.base == "FFMA2") for i, _ in path if i.base in ("FFMA", "FFMA2")]
        on_fma = len(products) >= max(64, 0.6 * len(path))  # a product on the float32 pipe
        stalls = sum(max(1, i.stall) for i, _ in path)
        work = len(path) * self.blocks * warps
        steady, _ = simulate(
            path,
            math.ceil(self.blocks * min(1, warps / 4)),
            max(1, warps // 4),
            6 if work < 24000 else 4 if work < 4e5 else 2,
            gpu.l2_latency if self.tensor or on_fma else gpu.dram_latency,
            self.stages,
            self.specialised,
        )
        spilled = sum(i.bytes for i, _ in path if i.kind in SPILLS) * warps
        announced = sum(i.bytes for i, _ in path if i.kind == "mbarrier")
        macs = int(sum(i.macs * (1 if i.once_a_block else warps) for i, _ in path))
        kinds = {i.dtype for i, _ in path if i.macs}
        if not macs and on_fma:
            macs, kinds = sum(products) * 32 * warps, {"fp32"}
        return self._rated(
            name,
            demand=_demand(path, warps),
            macs=macs,
            kinds=kinds,
            simulated=steady,
            chain=stalls * min(1, warps / 4),
            start=code.instructions[code.spans[head][0]].offset,
            end=max(code.block(k)[-1].offset for k in body),
            depth=sum(body < other for other in code.loops.values()),
            instructions=len(path),
            stalls=stalls,
            spill_bytes=spilled,
            load_bytes=_traffic(path, ("load", "copy"), warps) + announced,
            store_bytes=_traffic(path, ("store", "atomic"), warps),
            useful_bytes=_traffic(path, GLOBAL, warps, useful=True),
            tma_copies=sum(i.kind == "tma load" for i, _ in path),
            step=_counter(path),
            notes=self._notes(path, spilled, kinds),
        )

    def _notes(self, path: Path, spilled: int, kinds: set[str]) -> list[str]:
        present = {i.kind for i, _ in path}
        notes = []
        if spilled:
            notes.append(f"register spills inside the loop: {spilled} B a block and turn")
        if present & TENSOR and "load" in present and not present & {"copy", "tma load"}:
            notes.append("synchronous global loads feed the tensor loop (not pipelined)")
        if self.gpu.capability in (90, 100) and "mma" in present:
            share = f"{self.gpu.mma_sync:.0%}"
            notes.append(f"warp-level MMA: capped at {share} of the {self.gpu.name} tensor peak")
        if kinds == {"fp32"}:
            notes.append("product on float32 units: no tensor cores (ieee precision?)")
        return notes

    def _roles(self, leaves: list[LoopReport]) -> LoopReport:
        """Concurrent partitions: demands add up, trip counts are taken to be equal."""
        demand: dict[str, float] = defaultdict(float)
        for loop in leaves:
            for pipe, clocks in loop.demand.items():
                demand[pipe] += clocks
        sums = {
            name: sum(getattr(loop, name) for loop in leaves)
            for name in (
                "instructions",
                "spill_bytes",
                "load_bytes",
                "store_bytes",
                "useful_bytes",
                "tma_copies",
            )
        }
        return self._rated(
            "WS",
            demand={pipe: clocks / self.blocks for pipe, clocks in demand.items()},
            macs=sum(loop.macs for loop in leaves),
            kinds={kind for loop in leaves for kind in loop.dtype.split("/") if kind},
            simulated=max(loop.cycles[1] for loop in leaves),
            chain=0,
            start=0,
            end=0,
            depth=0,
            stalls=0,
            step="",
            notes=["warp-specialised: hand-offs not modelled, 10-55 % optimistic"],
            **sums,
        )

    def _rated(
        self,
        name: str,
        *,
        demand: dict[str, float],
        macs: int,
        kinds: set[str],
        simulated: float,
        chain: float,
        **rest: Any,
    ) -> LoopReport:
        """A loop's report, with its three bounds and what share of the peak they are."""
        gpu, blocks = self.gpu, self.blocks
        clocks = {pipe: round(c * blocks, 1) for pipe, c in demand.items()}
        busiest = max(clocks.values(), default=0)
        rates = [gpu.float32 if k == "fp32" else gpu.tensor.get(k, 1) for k in kinds]
        rate = max(rates, default=0)
        ideal = macs * blocks / rate if rate else 0
        simulated = max(simulated, busiest)
        serial = max(simulated, sum(c for pipe, c in clocks.items() if pipe != "issue"))
        cycles = [max(busiest, chain), simulated, serial]
        ceiling = min((gpu.ceiling.get(k, gpu.ceiling[""]) for k in kinds), default=1)
        peak = rate * 2 * gpu.multiprocessors * gpu.megahertz / 1e6
        utilisation = [round(ideal / c, 3) if c else 0 for c in cycles]
        reached = [u * ceiling if ceiling > 1 else min(u, ceiling) for u in utilisation]
        return LoopReport(
            name,
            demand=clocks,
            bottleneck=max(clocks, key=lambda pipe: clocks[pipe]) if clocks else "-",
            macs=macs,
            dtype="/".join(sorted(kinds)),
            utilisation=utilisation,
            cycles=[round(c, 1) for c in cycles],
            tflops=[round(peak * r, 1) for r in reached] if rate else [],
            **rest,
        )

    def report(self) -> Report:
        """The whole kernel."""
        gpu, info, warps = self.gpu, self.info, self.warps
        loops = self.loops()
        hot = max(loops, key=lambda x: (x.macs > 0, x.name == "WS", x.cycles[1]), default=None)
        outside = _Outside(self)
        streaming: dict[str, Any] = {}
        if not self.tensor and (hot is None or hot.dtype != "fp32"):
            streaming = self._streaming(hot, outside)
        live = self.code.live
        mix = Counter(i.kind for i in live if i.kind != "off")
        accesses = [
            i.bytes / i.replays
            for i in live
            if i.kind in ("load", "store", "copy") and i.varies & 1
        ]
        return Report(
            kernel=info.name,
            gpu=gpu.name,
            arch=gpu.capability,
            warps=warps,
            registers=info.registers,
            stack=info.stack,
            spills=mix["spill load"] + mix["spill store"],
            shared=self.shared,
            blocks_per_sm=self.resident,
            occupancy=round(self.resident * warps * 32 / gpu.threads, 3),
            limiter=self.limiter,
            instructions=len(live),
            mix=dict(mix),
            forms=dict(_forms(live)),
            loops=loops,
            hot=hot.name if hot else "",
            outside_cycles=outside.cycles,
            outside_bytes=[outside.loads, outside.stores, outside.common],
            bytes_per_access=round(sum(accesses) / len(accesses), 1) if accesses else 0,
            streaming=streaming,
            warnings=[
                *self.warnings,
                *_ailments(live, info.stack, self.spill_level),
                *(f"{loop.name}: {note}" for loop in loops for note in loop.notes),
            ],
            assumptions=ASSUMPTIONS,
        )

    def _streaming(self, hot: LoopReport | None, outside: "_Outside") -> dict[str, Any]:
        """Of a kernel bound by memory: DRAM's share a multiprocessor, against latency."""
        gpu, blocks = self.gpu, self.blocks
        if hot:
            loads, stores, useful = hot.load_bytes, hot.store_bytes, hot.useful_bytes
            simulated, least, spilled = hot.cycles[1], hot.cycles[0], hot.spill_bytes
        else:
            loads, stores, useful = outside.loads, outside.stores, outside.useful
            simulated = outside.simulated + LATENCY["launch"]
            least, spilled = outside.least, outside.spilled
        to_dram = spilled if self.spill_level == 2 else 0
        bytes_a_clock = gpu.dram_gbs * 1e3 / gpu.megahertz / gpu.multiprocessors
        memory = (loads + stores + to_dram) * blocks / bytes_a_clock / gpu.dram_efficiency

        def rate(clocks: float) -> int:
            if not clocks:
                return 0
            return round(useful * blocks / clocks * gpu.multiprocessors * gpu.megahertz / 1e3)

        return {
            "load": loads,
            "store": stores,
            "useful": useful,
            "spill_to_dram": to_dram,
            "in_flight": loads * blocks,
            "in_flight_needed": int(bytes_a_clock * gpu.dram_latency),
            "gbs": [
                rate(max(memory * gpu.dram_efficiency, least)),
                rate(max(memory, simulated)),
                rate(memory + simulated),
            ],
            "dram_peak": gpu.dram_gbs,
            "bound": "DRAM" if memory >= simulated else "latency/issue",
        }


class _Outside:
    """The code outside loops."""

    def __init__(self, kernel: _Kernel):
        gpu, warps, blocks = kernel.gpu, kernel.warps, kernel.blocks
        path = kernel.code.walk(None, 0, kernel.code.loops)
        demand = _demand(path, warps)
        _, self.simulated = simulate(
            path,
            math.ceil(blocks * min(1, warps / 4)),
            max(1, warps // 4),
            1,
            gpu.dram_latency,
            1,
            kernel.specialised,
        )
        self.least = max(demand.values(), default=0) * blocks
        serial = sum(c for pipe, c in demand.items() if pipe != "issue") * blocks
        self.cycles = [
            round(self.least),
            round(max(self.least, self.simulated)),
            round(max(self.least, serial, self.simulated)),
        ]
        self.loads = _traffic(path, ("load", "copy"), warps)
        self.stores = _traffic(path, ("store", "atomic"), warps)
        self.common = _traffic(path, ("load", "copy"), warps, common=True)
        self.useful = _traffic(path, GLOBAL, warps, useful=True)
        self.spilled = sum(i.bytes for i, _ in path if i.kind in SPILLS) * warps


def _encloses(outer: LoopReport, inner: LoopReport) -> bool:
    return inner is not outer and outer.start <= inner.start and inner.end <= outer.end


def _forms(live: Iterable[Instruction]) -> Counter[str]:
    """Memory, tensor and other listed instructions by name."""
    forms: Counter[str] = Counter()
    for i in live:
        if i.kind in MEMORY.values() and i.kind != "shuffle":
            size = f"x{i.bytes // 128}" if "SM" in i.base else str(width(i) * 8)
            forms[f"{i.base}.{size}"] += 1
        elif i.kind in TENSOR or i.base in LISTED:
            forms[i.opcode + (f"[{i.macs} MAC]" if i.kind == "tcgen05" else "")] += 1
    return forms


def _ailments(live: Iterable[Instruction], stack: int, spill_level: int) -> list[str]:
    """What is likely wrong with a kernel, in a sentence each."""
    live = list(live)
    place = ("L1", "L2", "DRAM")[spill_level]
    checks: list[tuple[Collection[str], Callable[[Instruction], bool], str]] = [
        (
            SPILLS,
            lambda i: True,
            f"spill instructions, {stack} B of stack a thread, spills live in {place}",
        ),
        (
            GLOBAL,
            lambda i: i.kind != "atomic" and bool(i.varies & 1) and i.bytes <= 64,
            "narrow global accesses (2 B a lane or less): a divisibility hint missing?",
        ),
        (
            GLOBAL,
            lambda i: i.replays >= 3 and i.bytes > 64,
            "uncoalesced global accesses (3 times the sectors or more)",
        ),
        (
            SHARED,
            lambda i: i.replays >= 2,
            "shared-memory accesses with bank conflicts (2 ways or more)",
        ),
        (("float64",), lambda i: True, "float64 instructions"),
        (
            ("control",),
            lambda i: i.base == "CALL" and "$" in i.operands and "guardrail" not in i.operands,
            "subroutine calls (slow division or square root?), bodies not costed",
        ),
    ]
    found = []
    for kinds, sick, words in checks:
        count = sum(i.kind in kinds and sick(i) for i in live)
        if count:
            found.append(f"{count} {words}")
    return found


def analyse(
    cubin: bytes,
    arch: int,
    *,
    warps: int = 0,
    shared: int = -1,
    stages: int = 2,
    tensor_memory: int = 0,
    gpu: Gpu | None = None,
    code: Disassembly | None = None,
) -> Report:
    """The modelled report of a cubin's first kernel.

    Args:
        cubin: Machine code.
        arch: Compute capability of the part to model, such as 90.
        warps: A block, where the cubin does not say.
        shared: Bytes a block, dynamic ones included; -1 if not known.
        stages: Of the software pipeline.
        tensor_memory: Columns a block.
        gpu: Another part.
        code: The cubin disassembled, if it is already; it is changed.

    Raises:
        ValueError: Not a cubin.
    """
    code = code or disassemble(cubin)
    kernel = _Kernel(cubin, code, gpu or GPUS[arch], warps, shared, stages, tensor_memory)
    built_for = struct.unpack_from("<I", cubin, 0x30)[0] >> (8 if cubin[8] > 7 else 0) & 255
    if built_for != arch:
        kernel.warnings.append(f"compiled for sm_{built_for}, modelled as {kernel.gpu.name}")
    return kernel.report()
