"""Writes docs/benchmarks.md from committed results; nothing in it is typed by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import snapshot
from .against import in_words, verdict
from .host import MODELS, in_bytes
from .suite import KEY, by_case
from .table import digits, hardware, human

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
PAGE = ROOT / "docs" / "benchmarks.md"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _machine_code(figures: dict[str, Any]) -> list[str]:
    """Every kernel on every target, at a typical size."""
    rows = []
    for key, row in figures["rows"].items():
        op, case, direction, kernel, target, *_ = key.split(" | ")
        if "error" in row:
            rows.append([op, case, f"`{kernel}`", direction, target, row["error"], *[""] * 6])
            continue
        tensor = " ".join(f"{n} {name}" for name, n in row["tensor"].items())
        rows.append(
            [
                op,
                case,
                f"`{kernel}`",
                direction,
                target,
                str(row["registers"]),
                str(row["spills"]),
                f"{row['shared']:,}",
                f"{row['occupancy']:.0%}",
                tensor or "-",
                str(row["barriers"]),
                digits(row["modelled_us"]),
            ]
        )
    header = (
        "op|inputs|kernel|pass|target|registers|spills|shared B|occupancy|tensor cores|barriers"
    )
    return _table([*header.split("|"), "modelled us"], rows)


def _calls(figures: dict[str, Any]) -> list[str]:
    """Forward and backward of every op, modelled, a column a target."""
    calls: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for key, call in figures["calls"].items():
        *which, target = key.split(" | ")
        calls.setdefault(tuple(which), {})[target] = call
    targets = list(figures["parts"])
    rows = []
    for (op, case, direction), by in calls.items():
        launches = str(next(iter(by.values()))["launches"])
        rows.append([op, case, direction, launches, *(_modelled(by.get(t)) for t in targets)])
    return _table(["op", "inputs", "pass", "launches", *targets], rows)


def _modelled(call: dict[str, Any] | None) -> str:
    """Microseconds, their range, and the share of the roofline where it is known."""
    if call is None:
        return ""
    low, middle, high = (digits(t) for t in call["modelled_us"])
    share = f", {call['roofline']:.0%}" if call["roofline"] else ""
    return f"{middle} ({low} to {high}){share}"


def _host(report: dict[str, Any]) -> list[str]:
    memory = [
        [
            row["op"],
            row["case"],
            human(row["saved"]) + "B",
            human(row["saved_eager"]) + "B",
            f"{row['launches_forward']} + {row['launches_backward']}",
        ]
        for row in report["memory"]
    ]
    calls = [
        [row["op"], str(row["fused_us"]), str(row["eager_us"]), f"{row['over_us']:+.2f}"]
        for row in report["calls"]
    ]
    models = [
        [row["model"], str(row["tokens"]), *(in_bytes(row[k]) for k in MODELS)]
        for row in report["models"]
    ]
    steps = [
        [row["model"], *(str(row[k]) for k in ("launches", "other_operators", "eager_operators"))]
        for row in report["steps"]
    ]
    return [
        "## Memory and launches",
        "",
        "Bytes kept for the backward beyond inputs and results, counted with saved-tensor hooks; "
        "launches of a forward and a backward. `eager` is the op's reference on CPU tensors.",
        "",
        *_table(["op", "inputs", "kept", "kept by eager", "launches"], memory),
        "",
        "## Memory of a model",
        "",
        "Bytes a token that a bfloat16 model keeps for the backward, parameters apart, counted: "
        "with our kernels, with their eager references, and by the same model of `transformers`, "
        "whose choice of attention on a CPU can differ from CUDA's as that of `eager` can.",
        "",
        *_table(["model", "tokens a sequence", *MODELS], models),
        "",
        "## Launches of a training step",
        "",
        "Forward, backward and AdamW, whatever the batch: launches of our kernels as host code "
        "makes them, PyTorch's operators beside them, and PyTorch's operators alone. Operators are "
        "counted where the step calls them; on a GPU most are a launch, some are several.",
        "",
        *_table(["model", "our launches", "operators beside", "PyTorch alone"], steps),
        "",
        "## Calls on the CPU",
        "",
        "Measured: microseconds of a call at the smallest size, beside PyTorch's own function.",
        "",
        *_table(["op", "fused", "PyTorch", "over"], calls),
        "",
        f"`import fastlm.kernels` takes {report['import_seconds']} s after torch and triton.",
    ]


def _peers(figures: dict[str, Any]) -> list[str]:
    """Ours against peers, modelled."""
    rows = [
        [row["op"], row["case"], row["pass"], row["peer"]]
        + [
            f"{row['ratios'][t]:.2f}x {verdict(row['ratios'][t])}".strip()
            if t in row["ratios"]
            else ""
            for t in figures["targets"]
        ]
        for row in figures["rows"]
    ]
    named = ", ".join(f"{name} {version}" for name, version in figures["peers"].items())
    return [
        "## Against peers, modelled",
        "",
        f"{in_words(figures['rows'])} By `fastlm bench peers`: {named}, through their own host "
        "code (FlexAttention: through Inductor), compiled and modelled in the same run as ours. "
        "Not measured.",
        "",
        *_table(["op", "inputs", "pass", "peer", *figures["targets"]], rows),
        *(["", "Not compared:", ""] if figures["missing"] else []),
        *(f"- {name}: {why}" for name, why in figures["missing"].items()),
        "",
    ]


def _timed() -> list[str]:
    """Runs on GPUs, if any were committed."""
    files = sorted(RESULTS.glob("timed-*.json"))
    if not files:
        none = "No run on a GPU has been committed: **no kernel was timed.**"
        return ["## Times", "", none]
    lines = ["## Times", ""]
    for file in files:
        report = json.loads(file.read_text())
        env = report["environment"]
        lines += [f"### {hardware(env)}, commit {env['commit']}", ""]
        rows = [
            [row["op"], row["case"], row["mode"], row["cache"], row["contender"]]
            + [digits(row[k] * 1e6) for k in ("p50", "p20", "p80")]
            for row in report["rows"]
            if row["status"] == "ok" and "p50" in row
        ]
        header = ["op", "inputs", "mode", "cache", "contender", "p50 us", "p20", "p80"]
        lines += [*_table(header, rows), ""]
    return lines


def _on_a_cpu() -> list[str]:
    """Whole models on CPUs beside peers."""
    reports = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("cpu-*.json"))]
    if not reports:
        return []
    places = {f"{hardware(r['environment'])}, torch {r['environment']['torch']}" for r in reports}
    rows = []
    for report in reports:
        medians = by_case(report["rows"])
        for row in report["rows"]:
            if "p50" not in row:
                continue
            against = medians[tuple(row[k] for k in KEY)].get(report["baseline"])
            rate, tokens = row["tokens_per_second"], row["tokens_per_second"] * row["p50"]
            middle = f"{digits(tokens / row['p80'])} to {digits(tokens / row['p20'])}"
            middle += "".join(f", {flag}" for flag in row["flags"])
            speed = f"{against / row['p50']:.2f}x {report['baseline']}" if against else ""
            rows.append([row["op"], row["case"], row["contender"], digits(rate), middle, speed])
    return [
        "## Whole models on a CPU, measured",
        "",
        "By `fastlm bench train --device cpu --nanogpt DIR`: in one process, in turns, with the "
        "same parameters, whose loss, gradients and logits were held to float64 first. Tokens a "
        "second, of the median step or text and of the middle 60 %; noisy: the middle half of the "
        "times is wider than 5 % of the median. On a CPU ours runs PyTorch's "
        f"operators, no kernels of its own. {'; '.join(sorted(places))}.",
        "",
        *_table(["model", "job", "contender", "tokens/s", "range", "speed"], rows),
        "",
    ]


def benchmarks_page() -> str:
    """The page, from the snapshot and the committed results."""
    figures = snapshot.read()
    peers = RESULTS / "peers.json"
    parts = ", ".join(f"{target}: {part['name']}" for target, part in figures["parts"].items())
    lines = [
        "# Benchmarks",
        "",
        "Generated by `make docs` from `bench/snapshot.json` and `bench/results/`. "
        "`fastlm bench` makes the same figures on your machine.",
        "",
        *_timed(),
        "",
        *_on_a_cpu(),
        "## Calls, modelled",
        "",
        f"Modelled from the machine code by `fastlm bench static`, triton {figures['triton']}; "
        f"not measured. Microseconds; in brackets the range from the slowest pipe alone to no "
        "overlap; then the share of the roofline, the least bytes or FLOPs of the call at the "
        f"part's peak. Parts: {parts}. "
        "Against published measurements of other kernels the simulated figure errs by about 14 % "
        "on tensor-core kernels and 8 % on streaming ones.",
        "",
        *_calls(figures),
        "",
        *(_peers(json.loads(peers.read_text())) if peers.is_file() else []),
        "## Machine code",
        "",
        "Facts read off the compiled code, at a typical size of each op.",
        "",
        *_machine_code(figures),
        "",
    ]
    host = RESULTS / "host.json"
    if host.is_file():
        lines += [*_host(json.loads(host.read_text())), ""]
    return "\n".join(lines)


def write_page() -> None:
    """Writes docs/benchmarks.md."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(benchmarks_page())
