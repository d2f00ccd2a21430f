"""A timed report as one HTML page: speed-ups, roofline, sweeps, memory, raw samples, losses."""

from collections.abc import Sequence
from typing import Any

from .charts import Point, bars, legend, lines, roofline
from .page import Cell, card, cards, filters, heading, page, paragraph, table, tiles
from .suite import KEY, by_case, summary
from .table import digits, hardware, human

Rows = Sequence[dict[str, Any]]


def timed_html(report: dict[str, Any]) -> str:
    """The page of a timed report."""
    env = report["environment"]
    rows = report["rows"]
    baseline = report.get("baseline", "eager")
    total = summary(rows, baseline)
    wrong = [row for row in rows if row["status"] in ("wrong", "invalid", "failed")]
    mean = f"{total['geometric_mean']:.2f}x" if total["geometric_mean"] else "-"
    body = [
        "<h1>fastlm, timed</h1>",
        paragraph(
            f"{hardware(env)}; fastlm {env['fastlm']}, commit "
            f"{env['commit']}; torch {env['torch']}, triton {env['triton']}"
        ),
        tiles(
            [
                (mean, f"geometric mean of speed-ups over {baseline}, losses included"),
                (str(total["wins"]), f"cases faster than {baseline}"),
                (str(total["losses"]), f"cases slower than {baseline}"),
                (str(len(wrong)), "contenders wrong, invalid or failed"),
                (f"{human(report['peaks']['bytes'])}B/s", "copy bandwidth measured here"),
            ]
        ),
        heading("Losses"),
        _losses(rows),
        *_roof(report),
    ]
    for op in dict.fromkeys(row["op"] for row in rows):
        body += _op_section(rows, op, baseline)
    body += [heading("Every case"), *_all_rows(rows), *_environment(report)]
    return page("fastlm: timed report", body, data=report)


def _losses(rows: Rows) -> str:
    """Cases in which another contender is faster, worst first."""
    found = []
    for key, times in by_case(rows).items():
        if "fused" not in times:
            continue
        best = min(times, key=lambda name: times[name])
        if best != "fused":
            found.append((times[best] / times["fused"], key, best, times))
    if not found:
        return paragraph("In no case is another contender faster.")
    header: list[Cell] = [(n, "") for n in ("op", "inputs", "mode", "cache", "fastest")]
    header += [(n, "n") for n in ("its us", "ours us", "ours at")]
    body: list[list[Cell]] = []
    for ratio, key, best, times in sorted(found):
        cells: list[Cell] = [(part, "") for part in (*key, best)]
        figures = (digits(times[best] * 1e6), digits(times["fused"] * 1e6), f"{ratio:.2f}x")
        body.append([*cells, *((figure, "n") for figure in figures)])
    return table(header, body)


def _roof(report: dict[str, Any]) -> list[str]:
    """Our forwards under the roofline measured on this card, each op at its largest size."""
    largest: dict[str, dict[str, Any]] = {}
    for row in report["rows"]:
        if row["contender"] == "fused" and row.get("gbs") and row.get("tflops"):
            largest[row["op"]] = row
    peaks = list(report["peaks"]["flops"].items())
    if not largest or not peaks:
        return []
    times = by_case(report["rows"])
    points = [
        Point(
            op,
            row["tflops"] * 1e3 / row["gbs"],
            row["tflops"] * 1e12,
            f"{row['case']}: {row['tflops']:.1f} TFLOP/s in {digits(row['p50'] * 1e6)} us",
            min(times[tuple(row[k] for k in KEY)].values()) < row["p50"],
        )
        for op, row in largest.items()
    ]
    chart = roofline(
        "forwards under the roofline",
        report["peaks"]["bytes"],
        peaks,
        points,
        colour=0,
        width=1160,
        height=460,
    )
    note = (
        "FLOPs a second against the FLOPs for each byte that the call must move, under the "
        "copy and the products measured on this card. Ringed in red: another contender is faster."
    )
    return [heading("Under the roofline"), card("Each op at its largest size", note, chart)]


def _op_section(rows: Rows, op: str, baseline: str) -> list[str]:
    mine = [row for row in rows if row["op"] == op and row["status"] == "ok" and "p50" in row]
    if not mine:
        return []
    names = list(dict.fromkeys(row["contender"] for row in mine))
    boxes = []
    for mode in dict.fromkeys(row["mode"] for row in mine):
        chosen = [row for row in mine if row["mode"] == mode]
        caches = {row["cache"] for row in chosen}
        chosen = [row for row in chosen if row["cache"] == ("cold" if "cold" in caches else "warm")]
        boxes += _mode_boxes(chosen, op, mode, names, baseline)
    return [heading(op), legend(names), cards(boxes)] if boxes else []


def _mode_boxes(rows: Rows, op: str, mode: str, names: Sequence[str], baseline: str) -> list[str]:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    median = {(row["case"], row["contender"]): row["p50"] for row in rows}
    speeds = []
    for case in cases:
        against = median.get((case, baseline))
        if against:
            members = [
                (name, against / median[case, name], f"{against / median[case, name]:.2f}x")
                for name in names
                if (case, name) in median
            ]
            speeds.append((case, members))
    boxes = []
    if speeds:
        limit = max(value for _, members in speeds for _, value, _ in members)
        chart = bars(
            f"{op} {mode}: speed-up over {baseline}", speeds, limit=limit, colours=names, mark=1.0
        )
        note = f"Dashed: {baseline} itself."
        boxes.append(card(f"Speed-up over {baseline}, {mode}", note, chart))
    series = []
    for name in names:
        points = [
            (float(i), median[case, name] * 1e6)
            for i, case in enumerate(cases)
            if (case, name) in median
        ]
        if len(points) > 1:
            series.append((name, points))
    if series:
        labels = [case.split(" ", 1)[-1] for case in cases]
        chart = lines(
            f"{op} {mode}: microseconds",
            series,
            x_label="size",
            y_label="microseconds, median",
            x_names=labels,
            unit=" us",
        )
        boxes.append(card(f"Time over sizes, {mode}", "", chart))
    last = [row for row in rows if row["case"] == cases[-1]]
    series = [
        (row["contender"], [(float(n), s * 1e6) for n, s in enumerate(row["samples"])])
        for row in last
        if len(row["samples"]) > 1
    ]
    if series:
        chart = lines(
            f"{op} {mode}: samples",
            series,
            x_label="sample, in the order taken",
            y_label="microseconds",
        )
        note = f"{cases[-1]}. Drift and noise show here; the page holds the samples of every case."
        boxes.append(card(f"Every sample, {mode}", note, chart))
    for key, title, limit, words in (
        ("roofline", "Share of the roofline measured here", 1.0, lambda v: f"{v:.0%}"),
        ("peak_bytes", "Peak memory", None, lambda v: f"{v / 2**20:.0f} MiB"),
    ):
        found = [
            (case, [(r["contender"], r[key], words(r[key])) for r in rows if r["case"] == case])
            for case in cases
            if all(r.get(key) is not None for r in rows if r["case"] == case)
        ]
        most = limit or max((v for _, m in found for _, v, _ in m), default=0)
        if found and most:
            chart = bars(f"{op} {mode}: {title}", found, limit=most, colours=names)
            boxes.append(card(f"{title}, {mode}", "", chart))
    return boxes


def _all_rows(rows: Rows) -> list[str]:
    header: list[Cell] = [(n, "") for n in ("op", "mode", "cache", "contender", "inputs")]
    numbers = ("p20 us", "p50 us", "p80 us", "host us", "samples", "error", "error of eager")
    header += [(n, "n") for n in numbers] + [("status", "")]
    body: list[list[Cell]] = []
    for row in rows:
        first: list[Cell] = [(row[k], "") for k in ("op", "mode", "cache", "contender")]
        first.append((row["case"], "wide"))
        good = row["status"] == "ok" and "p50" in row
        times = [digits(row[k] * 1e6) if good else "" for k in ("p20", "p50", "p80", "host")]
        count = str(len(row["samples"])) if good else ""
        errors = [
            f"{row[k]:.1e}" if row.get(k) is not None else "" for k in ("error", "error_eager")
        ]
        words = " ".join(
            [row["status"], *row.get("flags", ()), row.get("note", ""), row.get("reason") or ""]
        ).strip()
        status: Cell = (words, "wide" if row["status"] in ("ok", "skipped") else "bad")
        body.append([*first, *((t, "n") for t in (*times, count, *errors)), status])
    keys = [{k: row[k] for k in ("op", "mode", "contender")} for row in rows]
    choices = {k: list(dict.fromkeys(row[k] for row in rows)) for k in keys[0]} if keys else {}
    return [filters(choices), table(header, body, keys=keys)]


def _environment(report: dict[str, Any]) -> list[str]:
    facts = {**report["environment"], "seconds": report["seconds"], "command": report["command"]}
    for name, rate in report["peaks"]["flops"].items():
        facts[f"measured {name} product"] = f"{human(rate)}FLOP/s"
    body: list[list[Cell]] = [[(k, ""), (str(v), "wide")] for k, v in facts.items() if v]
    return [heading("Environment"), table([("what", ""), ("value", "")], body)]
