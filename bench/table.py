"""Reports as text, for a terminal."""

import math
from collections.abc import Sequence
from typing import Any

from .rules import excuses


def digits(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def human(value: float) -> str:
    """A number with a decimal prefix: ``"134 M"``."""
    if value <= 0:
        return "0 "
    power = min(5, max(0, int(math.log(value, 1000) + 1e-9)))
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}"


def in_a_line(error: BaseException) -> str:
    """An error's kind and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def columns(body: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows as lines of aligned columns, those in ``right`` set to the right."""
    widths = [max(len(line[i]) for line in body) for i in range(len(body[0]))]
    lines = []
    for line in body:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def accesses_in_short(row: dict[str, Any]) -> str:
    """Global accesses of a launch: ``ld 6x128 st 2x128``, how many of how many bits."""
    short = {"load": "ld", "store": "st", "copy": "cp", "tma": "tma"}
    parts = []
    for kind, widths in row["accesses"].items():
        ordered = sorted(((int(w), n) for w, n in widths.items()), reverse=True)
        parts.append(short[kind] + " " + "+".join(f"{n}x{w}" if w else f"{n}" for w, n in ordered))
    return " ".join(parts)


# --- static -------------------------------------------------------------------------------------

_HEADER = (
    "kernel",
    "target",
    "regs",
    "spill",
    "shared",
    "occ",
    "tensor",
    "global accesses",
    "f64",
    "bar",
    "modelled us",
)


def static_table(report: dict[str, Any]) -> str:
    """A static report: every kernel at one typical size an op, notices first and last."""
    env = report["environment"]
    lines = [report["notice"], ""]
    versions = f"torch {env['torch']}, triton {env['triton']}"
    lines.append(f"fastlm {env['fastlm']} ({env['commit']}), {versions}")
    for op in dict.fromkeys(row["op"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["op"] == op]
        cases = list(dict.fromkeys(row["case"] for row in rows))
        case = cases[len(cases) // 2]
        body = [_HEADER, *(_cells(row) for row in rows if row["case"] == case)]
        lines += ["", f"{op}  {case}", *columns(body, right=(2, 3, 4, 5, 8, 9))]
        lines += [
            _sentence(call) for call in report["calls"] if (call["op"], call["case"]) == (op, case)
        ]
    return "\n".join([*lines, "", *_footer(report), "", report["notice"]])


def _footer(report: dict[str, Any]) -> list[str]:
    refused = [
        f"  {row['op']} {row['case']} {row['kernel']} {row['target']}: {text}"
        for row in report["rows"]
        for text in row.get("refusals", [row.get("error", "")])
    ]
    excused = [f"  {text}" for text in excuses(report["rows"])]
    parts = ", ".join(f"{target} = {part['name']}" for target, part in report["parts"].items())
    return [
        f"Refused by the rules: {len(refused) or 'none'}",
        *refused[:20],
        *([f"Refused but accepted: {len(excused)}", *excused] if excused else []),
        "",
        "Assumptions of the model:",
        *(f"  {text}" for text in report["assumptions"]),
        f"  parts: {parts}",
        f"{report['distinct_kernels']} distinct kernels compiled in {report['seconds']} s, "
        f"{len(report['rows'])} launches; the table shows a typical size of each op.",
    ]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    kernel = (
        row["kernel"] if row["contender"] == "fused" else f"{row['contender']}: {row['kernel']}"
    )
    if "error" in row:
        return (kernel, row["target"], *[""] * 5, row["error"][:60], *[""] * 3)
    low, middle, high = row["modelled"]["microseconds"]
    tensor = "+".join(f"{n} {name}" for name, n in row["tensor"].items()) or "-"
    return (
        kernel,
        row["target"],
        str(row["registers"]),
        str(row["spills"]),
        str(row["shared"]),
        f"{row['occupancy']:.0%}",
        tensor,
        accesses_in_short(row),
        str(row["float64"]),
        str(row["barriers"]),
        ">= " * row["modelled"]["guessed"] + f"{digits(middle)} [{digits(low)}, {digits(high)}]",
    )


def _sentence(call: dict[str, Any]) -> str:
    launches = f"{call['launches']} launch{'es' if call['launches'] > 1 else ''}"
    modelled = ">= " * call["guessed"] + digits(call["microseconds"][1])
    whose = "" if call["contender"] == "fused" else f" by {call['contender']}"
    text = f"  {call['target']} {call['pass']}{whose}: modelled {modelled} us in {launches}"
    if call.get("roofline_share"):
        text += (
            f"; {human(call['bytes'])}B moved, {human(call['least_bytes'])}B needed, "
            f"{call['roofline_share']:.0%} of the roofline"
        )
    return text


# --- timed --------------------------------------------------------------------------------------


def timed_table(report: dict[str, Any]) -> str:
    """A timed report: every case and contender, then wins and losses."""
    from .suite import KEY, by_case, summary

    medians = by_case(report["rows"])
    baseline = report.get("baseline", "eager")
    lines = []
    models = any("tokens_per_second" in row for row in report["rows"])
    header = (
        "contender",
        "p50 us",
        "p20 to p80",
        "host us",
        "tokens/s" if models else "GB/s",
        "TFLOP/s",
        "roofline",
        "peak MiB",
        "speed-up",
        "error",
        "eager's",
        "",
    )
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        key = tuple(row[k] for k in KEY)
        groups.setdefault(key, []).append(row)
    for key, rows in groups.items():
        against = medians.get(key, {}).get(baseline)
        body = [header, *(_timed_cells(row, against) for row in rows)]
        lines += ["", "  ".join(key), *columns(body, right=range(1, 11))]
    total = summary(report["rows"], baseline)
    env = report["environment"]
    if total["cases"]:
        lines += [
            "",
            f"Against {baseline}: {total['wins']} faster, {total['losses']} slower of "
            f"{total['cases']} cases; geometric mean {total['geometric_mean']:.2f}x.",
        ]
    lines.append(
        f"{hardware(env)}, torch {env['torch']}, "
        f"triton {env['triton']}, fastlm {env['fastlm']} ({env['commit']})"
    )
    if env.get("contenders"):
        named = ", ".join(f"{name} {version}" for name, version in env["contenders"].items())
        lines.append(f"Peers: {named}")
    peak = report["peaks"]
    rates = ", ".join(f"{name} {human(rate)}FLOP/s" for name, rate in peak["flops"].items())
    if peak["flops"]:
        lines.append(f"Measured here: copy {human(peak['bytes'])}B/s, {rates}")
    if env.get("datasheet"):
        lines.append(f"By its maker: {env['datasheet']}")
    if env.get("sdpa_default"):
        lines.append(f"PyTorch's attention tries in order: {env['sdpa_default']}")
    return "\n".join(lines)


def hardware(environment: dict[str, Any]) -> str:
    """What a timed report was timed on."""
    driver = environment.get("driver")
    return f"{environment.get('device')}" + (f", driver {driver}" if driver else "")


def _timed_cells(row: dict[str, Any], against: float | None) -> tuple[str, ...]:
    if row["status"] != "ok":
        return (row["contender"], *[""] * 10, f"{row['status']}: {row['reason']}")
    errors = tuple("" if row[k] is None else f"{row[k]:.1e}" for k in ("error", "error_eager"))
    words = (*("~" + flag for flag in row.get("flags", ())), row.get("note", ""), row["reason"])
    said = " ".join(filter(None, words))
    if "p50" not in row:  # checked only
        return (row["contender"], *[""] * 8, *errors, f"right {said}".strip())
    rates = tuple(
        "" if row.get(k) is None else form.format(row[k])
        for k, form in (
            ("tokens_per_second" if "tokens_per_second" in row else "gbs", "{:.0f}"),
            ("tflops", "{:.1f}"),
            ("roofline", "{:.0%}"),
        )
    )
    return (
        row["contender"],
        digits(row["p50"] * 1e6),
        f"{digits(row['p20'] * 1e6)} to {digits(row['p80'] * 1e6)}",
        digits(row["host"] * 1e6),
        *rates,
        "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
        f"{against / row['p50']:.2f}x" if against else "",
        *errors,
        said,
    )
