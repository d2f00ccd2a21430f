"""Tries other tiles than those that ship, on this card, and keeps what is right and faster.

Each choice of a tile is walked downhill: every field halved and doubled, or a switch thrown, the
neighbours timed in turns with the tile so far, on to the fastest, until none is faster. A neighbour
is timed only where its results and gradients hold the contract, and the winner is checked again on
other inputs.
"""

import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastlm.kernels import _tuned

from . import check
from .compare import FASTER, verdict
from .suite import Bench, Setting, runner
from .table import columns, digits, in_a_line
from .timing import Timing, measure

_GAIN = 0.02  # of the time; less is not worth another tile
_SECONDS = 0.3  # of timing, a neighbour


@dataclass(frozen=True)
class Choice:
    """A place in the host code that chooses a tile.

    Attributes:
        key: Its name and arguments, as ``fastlm.kernels._tuned`` writes them.
        tile: That ships.
        fields: That may change.
        mode: The pass that it was met in; ``"full"`` for a tile that both take.
    """

    key: str
    tile: dict[str, int]
    fields: tuple[str, ...]
    mode: str


def choices(setting: Setting, device: Bench) -> list[Choice]:
    """The choices that the op's host code makes, forward and backward, in this setting."""
    found: dict[str, Choice] = {}
    inputs = setting.op.example(setting.dtype, device.place, **setting.size)

    def seen_in(mode: str) -> _tuned.Seen:
        def seen(key: str, tile: dict[str, int], fields: tuple[str, ...]) -> None:
            other = key in found and found[key].mode != mode
            found[key] = Choice(key, tile, fields, "full" if other else mode)

        return seen

    with _tuned.observed(seen_in("forward")):
        outputs = [t for t in check.tensors(setting.op.fused(**inputs)) if t.requires_grad]
    if outputs:
        with _tuned.observed(seen_in("backward")):
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    device.synchronize()
    return list(found.values())


def neighbours(tile: dict[str, int], fields: Sequence[str]) -> Iterator[dict[str, int]]:
    """Tiles that differ in one field: half and twice of it, or one less and one more of a few.

    Of a switch there is only the other position.
    """
    for name in fields:
        value = tile[name]
        if isinstance(value, bool):
            yield {**tile, name: not value}
            continue
        few = name in ("stages", "num_stages", "per_multiprocessor")
        for other in (value - 1, value + 1) if few else (value // 2, value * 2):
            if other >= 1 and not ("warps" in name and other > 32):
                yield {**tile, name: other}


class _Walk:
    """The search for one choice's tile."""

    def __init__(self, setting: Setting, choice: Choice, device: Bench, deadline: float):
        self.setting, self.choice, self.device, self.deadline = setting, choice, device, deadline
        self.rejected: dict[str, str] = {}
        self.tried = [choice.tile]
        self.examples: dict[int, tuple[check.Inputs, list[Any], list[Any]]] = {}

    def example(self, seed: int) -> tuple[check.Inputs, list[Any], list[Any]]:
        """Inputs, and what eager gives on them in their own dtype and in float64."""
        if seed not in self.examples:
            torch.manual_seed(seed)
            op = self.setting.op
            inputs = op.example(self.setting.dtype, self.device.place, **self.setting.size)
            exact = check.outcome(op.reference, check.copies(inputs, torch.float64))
            self.examples[seed] = inputs, check.outcome(op.reference, check.copies(inputs)), exact
        return self.examples[seed]

    def fault(self, tile: dict[str, int], seed: int) -> str:
        """Why a tile must not be used, or nothing."""
        inputs, eager, exact = self.example(seed)
        try:
            with _tuned.trial({self.choice.key: tile}), check.poisoned_memory():
                got = check.outcome(self.setting.op.fused, check.copies(inputs))
        except Exception as error:  # it does not compile, or does not fit
            return in_a_line(error)
        return check.judge(got, eager, exact, self.setting.dtype).wrong

    def timed(self, tiles: Sequence[dict[str, int]]) -> list[Timing]:
        """Times tiles in turns."""
        inputs, _, _ = self.example(1)
        run = runner(self.setting.op.fused, check.copies(inputs), self.choice.mode)

        def under(tile: dict[str, int]) -> Callable[[], Any]:
            def call() -> Any:
                with _tuned.trial({self.choice.key: tile}):
                    return run()

            return call

        calls = {str(n): under(tile) for n, tile in enumerate(tiles)}
        return list(measure(calls, self.device, budget=_SECONDS * len(calls)).values())

    def step(self, best: dict[str, int]) -> dict[str, int] | None:
        """The fastest right neighbour of a tile, or None if none is faster."""
        right = []
        for tile in neighbours(best, self.choice.fields):
            if tile in self.tried or self.device.now() > self.deadline:
                continue
            self.tried.append(tile)
            wrong = self.fault(tile, seed=1)
            if wrong:
                self.rejected[_changes(self.choice.tile, tile)] = wrong
            else:
                right.append(tile)
        if not right:
            return None
        now, *others = self.timed([best, *right])
        fastest, timing = min(zip(right, others, strict=True), key=lambda pair: pair[1].median)
        return fastest if _faster(now, timing) else None

    def row(self) -> dict[str, Any]:
        """Walks, and says what came of it."""
        choice, best = self.choice, self.choice.tile
        row: dict[str, Any] = {
            "op": self.setting.op.name,
            "case": self.setting.label,
            "mode": choice.mode,
            "key": choice.key,
            "shipped": choice.tile,
        }
        try:
            while following := self.step(best):
                best = following
            wrong = self.fault(best, seed=2) if best != choice.tile else ""
        except torch.OutOfMemoryError:
            return {**row, "status": "unchecked: float64 does not fit in memory"}
        row |= {"tried": len(self.tried) - 1, "rejected": self.rejected}
        if wrong:
            return {**row, "status": f"wrong on other inputs: {wrong}"}
        if best == choice.tile:
            return {**row, "status": "the shipped tile is the fastest"}
        shipped, tuned = self.timed([choice.tile, best])  # once more, those two alone
        row |= {"tile": best, "us": tuned.median * 1e6, "shipped_us": shipped.median * 1e6}
        kept = _faster(shipped, tuned)
        return {**row, "status": "kept" if kept else "no faster when timed again"}


def _faster(old: Timing, new: Timing) -> bool:
    fields = [{"p20": t.quantile(0.2), "p50": t.median, "p80": t.quantile(0.8)} for t in (old, new)]
    return verdict(*fields) == FASTER and new.median < old.median * (1 - _GAIN)


def _changes(shipped: dict[str, int], tile: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in tile.items() if value != shipped[name])


def tune(
    settings: Sequence[Setting],
    device: Bench,
    *,
    budget: float = 300.0,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """A row for each choice that the ops make in these settings.

    Args:
        settings: Ops, dtypes and sizes to look at.
        device: Where to run.
        budget: Seconds, after which the choices that are left are only named.
        progress: Told of each choice before it is walked.
    """
    deadline = device.now() + budget
    rows: list[dict[str, Any]] = []
    met: set[str] = set()
    for setting in settings:
        for choice in choices(setting, device):
            if choice.key in met:
                continue
            met.add(choice.key)
            progress(f"{setting.op.name} {setting.label}: {choice.key}")
            if device.now() > deadline:
                row = {"op": setting.op.name, "case": setting.label, "key": choice.key}
                rows.append({**row, "mode": choice.mode, "status": "not tried: out of time"})
            else:
                rows.append(_Walk(setting, choice, device, deadline).row())
    return rows


def winners(rows: Sequence[dict[str, Any]], commit: str) -> dict[str, dict[str, Any]]:
    """What to keep, by key, with the measurement that says so."""
    today = datetime.date.today().isoformat()
    return {
        row["key"]: {
            **{name: row[name] for name in ("tile", "shipped", "us", "shipped_us", "op", "case")},
            "measured": today,
            "commit": commit,
        }
        for row in rows
        if row["status"] == "kept"
    }


def tune_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    body: list[Sequence[str]] = [("op", "choice", "tried", "shipped us", "tuned us", "", "")]
    for row in rows:
        times = [digits(row[name]) if name in row else "" for name in ("shipped_us", "us")]
        change = _changes(row["shipped"], row["tile"]) if "tile" in row else ""
        tried = str(row.get("tried", ""))
        body.append((row["op"], row["key"], tried, *times, change, row["status"]))
    kept = sum(row["status"] == "kept" for row in rows)
    refused = sum(len(row.get("rejected", ())) for row in rows)
    total = (
        f"{kept} of {len(rows)} choices have a faster tile; {refused} tiles were wrong or failed"
    )
    return "\n".join([*columns(body, right=(2, 3, 4)), "", total])
