"""Ours against peers in one static report: the same model on both, losses as plain as wins."""

from collections.abc import Sequence
from typing import Any

from .table import columns

CLOSE = 0.15  # of a modelled time: the model cannot tell two kernels that near each other apart


def by_target(
    report: dict[str, Any], op: str, case: str
) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """An op's calls at one case by target, for each pass and contender, forward and ours first."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for call in report["calls"]:
        if (call["op"], call["case"]) == (op, case):
            found.setdefault((call["pass"], call["contender"]), {})[call["target"]] = call
    first = ("forward", "backward").index
    return dict(sorted(found.items(), key=lambda pair: (first(pair[0][0]), pair[0][1] != "fused")))


def against_peers(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each op, case, pass and peer: the peer's modelled time over ours by target."""
    found = []
    for op in dict.fromkeys(call["op"] for call in report["calls"]):
        for case in dict.fromkeys(c["case"] for c in report["calls"] if c["op"] == op):
            calls = by_target(report, op, case)
            for (direction, contender), theirs in calls.items():
                ours = calls.get((direction, "fused"), {})
                ratios = {
                    target: round(
                        theirs[target]["microseconds"][1] / ours[target]["microseconds"][1], 3
                    )
                    for target in report["targets"]
                    if target in theirs and target in ours and ours[target]["microseconds"][1]
                }
                if contender != "fused" and ratios:
                    row = {"op": op, "case": case, "pass": direction, "peer": contender}
                    found.append({**row, "ratios": ratios})
    return found


def verdict(ratio: float | None) -> str:
    """``"win"``, ``"loss"``, or nothing where the model cannot tell."""
    if ratio is None or 1 / (1 + CLOSE) <= ratio <= 1 + CLOSE:
        return ""
    return "win" if ratio > 1 else "loss"


def in_words(rows: Sequence[dict[str, Any]]) -> str:
    """How many figures are wins and losses."""
    said = [verdict(ratio) for row in rows for ratio in row["ratios"].values()]
    return (
        "The peer's modelled time over ours, of its own kernels alone: above 1 ours is faster. Of "
        f"{len(said)} figures {said.count('win')} are wins, {said.count('loss')} are losses, and "
        f"the rest are within {CLOSE:.0%}, where the model cannot tell. Liger-Kernel's losses "
        "compute their gradient in the forward, and their backward leaves its pass out where the "
        "incoming gradient is 1: add forward and backward up before judging them."
    )


def peers_table(report: dict[str, Any]) -> str:
    """The rows as text."""
    rows = against_peers(report)
    body: list[Sequence[str]] = [("op", "inputs", "pass", "peer", *report["targets"])]
    for row in rows:
        figures = [
            f"{row['ratios'][t]:.2f}x {verdict(row['ratios'][t])}".strip()
            if t in row["ratios"]
            else ""
            for t in report["targets"]
        ]
        body.append((row["op"], row["case"], row["pass"], row["peer"], *figures))
    missing = [f"  {name}: {why}" for name, why in report["missing_peers"].items()]
    return "\n".join(
        [report["notice"], "", *columns(body), "", in_words(rows), *missing, "", report["notice"]]
    )
