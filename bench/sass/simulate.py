"""In-order issue of all resident warps of one SM sub-partition, as the control bits allow it."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from .control_flow import Path
from .gpus import LATENCY

# Backlog in clocks that a pipe takes on before issue to it blocks.
_QUEUE = {
    "fma": 0,
    "alu": 0,
    "imad": 2,
    "special": 8,
    "lsu": 40,
    "l2": 4000,
    "tensor": 0,
    "tmem": 40,
    "uniform": 4,
    "float64": 0,
}
_NEVER = math.inf


@dataclass
class _Block:
    """What the warps of one block share."""

    commits: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    copies: list[float] = field(default_factory=list)
    held: list["_Warp"] = field(default_factory=list)
    products_end: float = 0.0


@dataclass(eq=False)
class _Warp:
    block: _Block
    lead: bool
    at: int = 0
    turn: int = 0
    ready: float = 0.0
    scoreboards: list[list[float]] = field(default_factory=lambda: [[] for _ in range(6)])
    copied: float = 0.0
    product_groups: list[float] = field(default_factory=list)
    product_end: float = 0.0
    earliest: float | None = None
    waits: int = 0
    held: bool = False
    done: bool = False


def _drain(pending: Sequence[float], allowed: int, earliest: float) -> tuple[float, list[float]]:
    """When at most ``allowed`` of the groups are pending, and those that are."""
    ordered = sorted(pending)
    if len(ordered) <= allowed:
        return earliest, ordered
    return max(earliest, ordered[len(ordered) - allowed - 1]), ordered[len(ordered) - allowed :]


def simulate(
    path: Path,
    blocks: int,
    warps_a_block: int,
    turns: int,
    memory_latency: int,
    stages: int = 2,
    specialised: bool = False,
) -> tuple[float, float]:
    """Runs warps through a path several times.

    Args:
        path: Instructions, and whether one elected thread issues each.
        blocks: Resident on the sub-partition.
        warps_a_block: On the sub-partition.
        turns: How often each warp runs the path.
        memory_latency: Clocks of a global load.
        stages: Of the software pipeline, which hides TMA copies.
        specialised: Whether warps have different roles; waits between them are then left out.

    Returns:
        Clocks of a turn once they repeat, and of all turns.
    """
    trace = [step for step in path if step[0].kind != "off"]
    if not trace:
        return 0.0, 0.0
    run = _Simulation(trace, blocks, warps_a_block, turns, memory_latency, stages, specialised)
    run.run()
    first = min(2, turns - 1)
    last = run.ends[-1]
    steady = (last - run.ends[first - 1]) / (turns - first) if first else last
    return steady, last


class _Simulation:
    def __init__(
        self,
        trace: Path,
        blocks: int,
        warps_a_block: int,
        turns: int,
        memory_latency: int,
        stages: int,
        specialised: bool,
    ):
        self.trace = trace
        self.warps_a_block = warps_a_block
        self.turns = turns
        self.memory_latency = memory_latency
        self.stages = stages
        self.specialised = specialised
        self.free = dict.fromkeys(_QUEUE, 0.0)
        self.slot = 0.0
        self.last = -1
        self.ends = [0.0] * turns
        self.copies = sum(i.kind == "tma load" for i, _ in trace)
        self.partner = self._partners()
        self.warps = []
        for _ in range(blocks):
            block = _Block()
            self.warps += [_Warp(block, lead=k == 0) for k in range(warps_a_block)]

    def _partners(self) -> dict[int, int]:
        """The tcgen05 commit of each mbarrier wait: of the same register, else next in order."""

        def register(n: int) -> str:
            match = re.search(r"\[(U?R\d+)", self.trace[n][0].operands)
            return match[1] if match else ""

        places = range(len(self.trace))
        commits = {n for n in places if self.trace[n][0].kind == "tcgen05 commit"}
        waits = [n for n in places if self.trace[n][0].kind == "mbarrier wait"]
        partner: dict[int, int] = {}
        for wait in waits:
            same = [c for c in commits if register(c) == register(wait)]
            if same:
                partner[wait] = max([c for c in same if c < wait] or same)
                commits -= set(same)
        for commit in sorted(commits):
            left = [w for w in waits if w not in partner]
            if left:
                nearest = min(left, key=lambda w: (w - commit) % len(self.trace))
                partner[nearest] = commit
        return partner

    def run(self) -> None:
        """Issues one instruction after another until every warp is done."""
        for warp in self.warps:
            self._skip(warp)
        running = len(self.warps)
        while running:
            best, chosen = _NEVER, -1
            for n, warp in enumerate(self.warps):
                if warp.done or warp.held:
                    continue
                earliest = self._earliest(warp)
                if earliest == _NEVER:
                    continue
                if earliest < best or (earliest == best and n == self.last):
                    best, chosen = earliest, n
            if chosen < 0:  # an unmatched barrier: no further progress can be modelled
                return
            self._issue(self.warps[chosen], best)
            self.last = chosen
            running -= self.warps[chosen].done

    def _skip(self, warp: _Warp) -> None:
        """Passes over what another warp's elected thread issues."""
        while warp.at < len(self.trace) and self.trace[warp.at][1] and not warp.lead:
            warp.at += 1

    def _earliest(self, warp: _Warp) -> float:
        """When the warp's next instruction may issue."""
        if warp.earliest is None:
            warp.earliest = self._dependences(warp)
        if warp.earliest == _NEVER:
            warp.earliest = None
            return _NEVER
        i = self.trace[warp.at][0]
        earliest = max(warp.earliest, self.slot)
        patience = 9999 if i.kind in ("wgmma", "tcgen05") else 0
        for pipe in i.pipes:
            earliest = max(earliest, self.free[pipe] - max(patience, _QUEUE[pipe]))
        return earliest

    def _dependences(self, warp: _Warp) -> float:
        """When what the instruction waits for is there."""
        i = self.trace[warp.at][0]
        earliest = warp.ready
        for k in range(6):
            if i.waits >> k & 1 and warp.scoreboards[k]:
                earliest = max(earliest, *warp.scoreboards[k])
                warp.scoreboards[k] = []
        match = re.match(r"SB(\d), (0x[0-9a-f]+)", i.operands) if i.base == "DEPBAR" else None
        if match:
            k = int(match[1])
            earliest, warp.scoreboards[k] = _drain(warp.scoreboards[k], int(match[2], 16), earliest)
        elif i.base == "WARPGROUP" and "DEPBAR" in i.modifiers:
            allowed = int(i.operands.split(",")[-1], 16)
            earliest, warp.product_groups = _drain(warp.product_groups, allowed, earliest)
        elif i.kind == "mbarrier wait" and not self.specialised:
            earliest = self._barrier(warp, earliest)
        return earliest

    def _barrier(self, warp: _Warp, earliest: float) -> float:
        """When an mbarrier's phase ends: that of a product's commit, or of a TMA copy."""
        if warp.at in self.partner:
            commit = self.partner[warp.at]
            needed = warp.turn + (commit < warp.at)
            done = warp.block.commits[commit]
            if needed > len(done):
                return _NEVER
            return max(earliest, done[needed - 1]) if needed else earliest
        if self.copies:  # fetched stages - 1 turns ahead, first in, first out
            ahead = (self.stages - 1) * self.copies if self.turns > 1 else 0
            n = warp.waits - ahead
            if 0 <= n < len(warp.block.copies):
                return max(earliest, warp.block.copies[n])
        return earliest

    def _issue(self, warp: _Warp, now: float) -> None:
        i = self.trace[warp.at][0]
        done = read = now
        self.slot = now + 1
        warp.earliest = None
        if not i.once_a_block or warp.lead:
            for pipe, clocks in i.pipes.items():
                start = max(now, self.free[pipe])
                self.free[pipe] = start + clocks
                done = max(done, start + clocks)
                if pipe == "lsu" and i.kind != "tcgen05":
                    read = max(read, start + clocks)
        from_memory = i.kind in ("load", "atomic", "copy")
        finished = done + (self.memory_latency if from_memory else i.latency)
        self._note(warp, now, finished)
        if i.write_barrier < 6:
            warp.scoreboards[i.write_barrier].append(finished)
        if i.read_barrier < 6:
            warp.scoreboards[i.read_barrier].append(read + 8)
        warp.ready = now + max(1, i.stall)
        warp.at += 1
        if i.base == "BAR" and "SYNC" in i.modifiers and not self.specialised:
            self._synchronise(warp, now)
        self._skip(warp)
        if warp.at >= len(self.trace):
            single = self.turns == 1 and i.kind != "control"
            self.ends[warp.turn] = max(self.ends[warp.turn], finished if single else now)
            warp.turn += 1
            warp.at = 0
            self._skip(warp)
            warp.done = warp.turn == self.turns

    def _note(self, warp: _Warp, now: float, finished: float) -> None:
        """Records what later waits will ask for."""
        i = self.trace[warp.at][0]
        block = warp.block
        if i.kind == "copy":
            warp.copied = max(warp.copied, finished)
        elif i.base == "LDGDEPBAR":
            warp.scoreboards[0].append(warp.copied)
        elif i.kind == "wgmma":
            warp.product_end = max(warp.product_end, finished)
            if "gsb0" in i.operands:
                warp.product_groups.append(warp.product_end)
        elif i.kind == "mbarrier wait":
            warp.waits += warp.at not in self.partner
        elif warp.lead and i.kind == "tcgen05":
            block.products_end = finished
        elif warp.lead and i.kind == "tcgen05 commit":
            block.commits[warp.at].append(max(now, block.products_end))
        elif warp.lead and i.kind == "tma load":
            block.copies.append(now + self.memory_latency)

    def _synchronise(self, warp: _Warp, now: float) -> None:
        """Holds the warp until all of its block are at the barrier."""
        held = warp.block.held
        held.append(warp)
        warp.held = True
        if len(held) < self.warps_a_block:
            return
        for other in held:
            other.ready = max(other.ready, now + LATENCY["barrier"])
            other.earliest = None
            other.held = False
        held.clear()
