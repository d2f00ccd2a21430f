"""Ours against peers in one static report: the same model on both, losses as plain as wins."""

from collections.abc import Sequence
from typing import Any

from .table import columns

BOTH = "forward + backward"
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
    """A row for each op, case, pass and peer: the peer's modelled time over ours by target.

    Where ours has a backward, a row of both passes follows: a peer may do in one what we do in the
    other, and without backward kernels of its own it has computed the gradient in the forward.
    """
    found = []
    for op in dict.fromkeys(call["op"] for call in report["calls"]):
        for case in dict.fromkeys(c["case"] for c in report["calls"] if c["op"] == op):
            calls = by_target(report, op, case)
            for contender in dict.fromkeys(c for _, c in calls if c != "fused"):
                theirs = _times(calls, contender)
                ours = _times(calls, "fused")
                for direction in ("forward", "backward", BOTH):
                    ratios = {
                        target: round(theirs[direction][target] / ours[direction][target], 3)
                        for target in report["targets"]
                        if ours[direction].get(target) and target in theirs[direction]
                    }
                    if ratios:
                        row = {"op": op, "case": case, "pass": direction, "peer": contender}
                        found.append({**row, "ratios": ratios})
    return found


def _times(
    calls: dict[tuple[str, str], dict[str, dict[str, Any]]], contender: str
) -> dict[str, dict[str, float]]:
    """Modelled microseconds of a contender by pass and target, both passes summed."""
    forward, backward = (
        {target: call["microseconds"][1] for target, call in calls.get((d, contender), {}).items()}
        for d in ("forward", "backward")
    )
    both = {t: time + backward.get(t, 0.0) for t, time in forward.items()}
    trained = any(direction == "backward" for direction, _ in calls)
    return {"forward": forward, "backward": backward, BOTH: both if trained else {}}


def verdict(ratio: float | None) -> str:
    """``"win"``, ``"loss"``, or nothing where the model cannot tell."""
    if ratio is None or 1 / (1 + CLOSE) <= ratio <= 1 + CLOSE:
        return ""
    return "win" if ratio > 1 else "loss"


def in_words(rows: Sequence[dict[str, Any]]) -> str:
    """How many calls are wins and losses, forward and backward together."""
    key = ("op", "case", "peer")
    summed = {tuple(row[k] for k in key) for row in rows if row["pass"] == BOTH}
    judged = [r for r in rows if r["pass"] == BOTH or tuple(r[k] for k in key) not in summed]
    said = [verdict(ratio) for row in judged for ratio in row["ratios"].values()]
    slower = sum(ratio < 1 for row in judged for ratio in row["ratios"].values())
    return (
        "The peer's modelled time over ours, of its own kernels alone: above 1 ours is faster. "
        f"Judged by forward and backward together, {len(said)} figures: {said.count('win')} are "
        f"wins, {said.count('loss')} are losses, and the rest are within {CLOSE:.0%}, where the "
        f"model cannot tell; in {slower} of all ours is the slower by any margin. Liger-Kernel's "
        "losses compute their gradient in the forward, over the logits, and have no backward of "
        "their own where the incoming gradient is 1: their forward alone says little."
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
