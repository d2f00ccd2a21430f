"""A committed snapshot of machine-code figures, and what counts as a regression against it."""

import json
from pathlib import Path
from typing import Any

from .static import static_report

FILE = Path(__file__).resolve().parent / "snapshot.json"
_SLOWER = 0.03  # of the modelled time

_KEY = ("op", "case", "pass", "kernel", "target")
_KEPT = (
    "registers",
    "spills",
    "shared",
    "blocks_per_sm",
    "occupancy",
    "instructions",
    "tensor",
    "float64",
    "barriers",
)


def take(processes: int = 2) -> dict[str, Any]:
    """The figures of every op at one typical size, now."""
    report = static_report(sizes="one", processes=processes)
    rows: dict[str, dict[str, Any]] = {}
    for row in report["rows"]:
        if "error" in row:
            figures: dict[str, Any] = {"error": row["error"]}
        else:
            figures = {name: row[name] for name in _KEPT}
            figures["modelled_us"] = row["modelled"]["microseconds"][1]
        rows[" | ".join(row[k] for k in _KEY)] = figures
    calls = {
        " | ".join((c["op"], c["case"], c["pass"], c["target"])): {
            "modelled_us": c["microseconds"],
            "launches": c["launches"],
            "bytes": c["bytes"],
            "least_bytes": c.get("least_bytes"),
            "roofline": c.get("roofline_share"),
        }
        for c in report["calls"]
    }
    env = report["environment"]
    return {
        "triton": env["triton"],
        "parts": report["parts"],
        "rows": dict(sorted(rows.items())),
        "calls": dict(sorted(calls.items())),
    }


def write(snapshot: dict[str, Any], file: Path = FILE) -> None:
    """Writes a snapshot, a row a line, so that a change shows as the rows it touches."""
    lines = ["{", *(f'"{name}": {json.dumps(snapshot[name])},' for name in ("triton", "parts"))]
    for name, end in (("rows", ","), ("calls", "")):
        body = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in snapshot[name].items()]
        lines += [f'"{name}": {{', ",\n".join(body), "}" + end]
    file.write_text("\n".join([*lines, "}"]) + "\n")


def read(file: Path = FILE) -> dict[str, Any]:
    """A written snapshot.

    Raises:
        ValueError: There is none.
    """
    if not file.is_file():
        raise ValueError(f"bench: there is no snapshot at {file}; make one with --update")
    return json.loads(file.read_text())


def regressions(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What became worse, each with its row named. Rows that are new are not judged.

    Raises:
        ValueError: The snapshots are of different compilers, which move every figure.
    """
    if old["triton"] != new["triton"]:
        raise ValueError(
            f"bench: the snapshot is of triton {old['triton']}, this is {new['triton']}; "
            "take a new one with --update"
        )
    found = []
    for key, before in old["rows"].items():
        after = new["rows"].get(key)
        if after is None:
            found.append(f"{key}: gone; if that is meant, take a new snapshot")
        elif "error" in after:
            found.append(f"{key}: {after['error']}")
        elif "error" not in before:
            found += [f"{key}: {text}" for text in _worse(before, after)]
    return found


def _worse(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One row's regressions."""
    found = [
        f"{name} {before[name]} -> {after[name]}"
        for name in ("spills", "float64")
        if after[name] > before[name]
    ]
    lost = sorted(before["tensor"].keys() - after["tensor"].keys())
    if lost:
        found.append(f"no {', '.join(lost)} any more, now {after['tensor'] or 'none'}")
    if after["blocks_per_sm"] < before["blocks_per_sm"]:
        found.append(
            f"blocks a multiprocessor {before['blocks_per_sm']} -> {after['blocks_per_sm']} "
            f"(registers {before['registers']} -> {after['registers']}, "
            f"shared {before['shared']} -> {after['shared']})"
        )
    ratio = after["modelled_us"] / before["modelled_us"] if before["modelled_us"] else 1.0
    if ratio > 1 + _SLOWER:
        times = f"{before['modelled_us']} -> {after['modelled_us']} us"
        found.append(f"modelled time {times} ({ratio - 1:+.1%})")
    return found
