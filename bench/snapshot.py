"""A committed snapshot of machine-code figures, and what counts as a regression against it."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import triton

from fastlm.kernels import OPS

from .fingerprint import fingerprint, model_version
from .static import TARGETS, compiled_rows, gather, static_report

FILE = Path(__file__).resolve().parent / "snapshot.json"
_SLOWER = 0.03  # of the modelled time

_KEY = ("op", "case", "pass", "kernel", "target")
_KEPT = (
    "fingerprint",
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


_AGAIN = 6  # rows that are compiled though nothing of theirs has changed


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    if "error" in row:
        return {"fingerprint": row["fingerprint"], "error": row["error"]}
    return {name: row[name] for name in _KEPT} | {"modelled_us": row["modelled"]["microseconds"][1]}


def _labels(rows: Iterable[Sequence[str]]) -> list[str]:
    """A name for each row of op, case, pass, kernel, target; those alike are numbered."""
    seen: Counter[str] = Counter()
    found = []
    for row in rows:
        name = " | ".join(row)
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} | {seen[name]}")
    return found


def take(processes: int = 2) -> dict[str, Any]:
    """The figures of every op at one typical size, now."""
    report = static_report(targets=TARGETS, ops=list(OPS), sizes="one", processes=processes)
    names = _labels([row[k] for k in _KEY] for row in report["rows"])
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
    return {
        "triton": report["environment"]["triton"],
        "model": model_version(),
        "parts": report["parts"],
        "rows": dict(sorted(zip(names, map(_figures, report["rows"]), strict=True))),
        "calls": dict(sorted(calls.items())),
    }


def changed(committed: dict[str, Any], processes: int = 2) -> tuple[dict[str, Any], int]:
    """The figures now, of which only what has changed since is compiled, and a few others.

    Returns:
        A snapshot without ``calls``, and how many launches were compiled.

    Raises:
        ValueError: The snapshot is of another compiler or model.
    """
    _check_makers(committed, {"triton": triton.__version__, "model": model_version()})
    jobs = gather(TARGETS, list(OPS))
    names = _labels(
        (c.op, c.label, "backward" if c.backward else "forward", c.launch.name, f"sm_{arch}")
        for c, arch in jobs
    )
    marks = [fingerprint(case.launch, arch) for case, arch in jobs]
    known = {row["fingerprint"]: row for row in committed["rows"].values()}
    again = set(sorted(known)[:_AGAIN])  # as good as drawn by lot, and the same until they change
    todo = [n for n, mark in enumerate(marks) if mark in again or mark not in known]
    compiled = compiled_rows(jobs, processes, [jobs[n] for n in todo])
    fresh = dict(zip(todo, map(_figures, compiled), strict=True))
    rows = {name: fresh.get(n) or known[marks[n]] for n, name in enumerate(names)}
    return {"triton": committed["triton"], "model": committed["model"], "rows": rows}, len(todo)


def write(snapshot: dict[str, Any], file: Path = FILE) -> None:
    """Writes a snapshot, a row a line, so that a change shows as the rows it touches."""
    makers = ("triton", "model", "parts")
    lines = ["{", *(f'"{name}": {json.dumps(snapshot[name])},' for name in makers)]
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
        ValueError: The snapshots are of different compilers or models, which move every figure.
    """
    _check_makers(old, new)
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


def _check_makers(old: dict[str, Any], new: dict[str, Any]) -> None:
    for maker in ("triton", "model"):
        if old[maker] != new[maker]:
            raise ValueError(
                f"bench: the snapshot is of {maker} {old[maker]}, this is {new[maker]}; "
                "take a new one with make snapshot"
            )


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
