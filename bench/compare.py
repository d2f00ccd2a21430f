"""Compares two reports of one machine, case by case, by their intervals."""

from collections.abc import Sequence
from typing import Any

from .suite import KEY
from .table import columns, digits

SAME, FASTER, SLOWER, AMBIGUOUS = "SAME", "FASTER", "SLOWER", "AMBIGUOUS"
_CLOSE = 0.01  # medians closer than this are the same whatever the intervals

_MACHINE = ("device", "driver", "cuda")
_KEY = (*KEY, "contender")


def verdict(old: dict[str, Any], new: dict[str, Any]) -> str:
    """How the new row stands to the old, by the range of the middle 60 % of the samples.

    Apart: FASTER or SLOWER. Medians within 1 %, or each inside the other's range: SAME. Ranges
    that overlap while a median lies outside the other's: AMBIGUOUS.
    """
    if abs(new["p50"] / old["p50"] - 1) <= _CLOSE:
        return SAME
    if new["p80"] < old["p20"]:
        return FASTER
    if new["p20"] > old["p80"]:
        return SLOWER
    inside = old["p20"] <= new["p50"] <= old["p80"] and new["p20"] <= old["p50"] <= new["p80"]
    return SAME if inside else AMBIGUOUS


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each case of either report.

    Raises:
        ValueError: Not two timed reports, or of different hardware or drivers.
    """
    for report in (old, new):
        if not report.get("timed"):
            raise ValueError("compare: both reports must be timed; a static one has no times")
    for fact in _MACHINE:
        a, b = old["environment"].get(fact), new["environment"].get(fact)
        if a != b:
            raise ValueError(f"compare: {fact} must be the same in both reports; got {a} and {b}")
    before, after = (
        {tuple(row[k] for k in _KEY): row for row in report["rows"]} for report in (old, new)
    )
    rows = []
    for key in dict.fromkeys([*before, *after]):
        row = dict(zip(_KEY, key, strict=True))
        pair = before.get(key), after.get(key)
        timed = [r for r in pair if r is not None and r["status"] == "ok"]
        if len(timed) < 2:
            said = [r["status"] if r is not None else "absent" for r in pair]
            rows.append({**row, "verdict": " -> ".join(said), "change": None})
            continue
        first, second = timed
        change = second["p50"] / first["p50"] - 1
        times = {"old": first["p50"], "new": second["p50"], "change": change}
        rows.append({**row, "verdict": verdict(first, second), **times})
    return rows


def regressions(rows: Sequence[dict[str, Any]], limit: float) -> list[dict[str, Any]]:
    """Rows that are slower by more than ``limit``, or no longer right."""
    return [
        row
        for row in rows
        if (row["verdict"] == SLOWER and row["change"] > limit)
        or (row["verdict"].startswith("ok -> ") and row["change"] is None)
    ]


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, the largest changes first."""
    ordered = sorted(rows, key=lambda row: -abs(row["change"] or 0))
    body: list[Sequence[str]] = [
        ("op", "inputs", "mode", "cache", "contender", "old us", "new us", "change", "")
    ]
    for row in ordered:
        times = ("", "", "")
        if row["change"] is not None:
            old, new = (digits(row[k] * 1e6) for k in ("old", "new"))
            times = (old, new, f"{row['change']:+.1%}")
        body.append((*(row[k] for k in _KEY), *times, row["verdict"]))
    counts = {
        name: sum(row["verdict"] == name for row in rows)
        for name in (SAME, FASTER, SLOWER, AMBIGUOUS)
    }
    total = ", ".join(f"{n} {name}" for name, n in counts.items())
    return "\n".join([*columns(body, right=(5, 6, 7)), "", total])
