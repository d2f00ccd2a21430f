"""A static report as one HTML page: charts, every launch, the environment, the assumptions."""

from collections.abc import Sequence
from typing import Any

from .against import against_peers, by_target, in_words, verdict
from .charts import Point, bars, legend, lines, ranges, roofline
from .page import (
    Cell,
    card,
    cards,
    filters,
    heading,
    listing,
    page,
    paragraph,
    table,
    tiles,
)
from .rules import excuses
from .table import accesses_in_short, digits, human

Rows = list[dict[str, Any]]


def html(report: dict[str, Any]) -> str:
    """The page of a static report."""
    env = report["environment"]
    ops = list(dict.fromkeys(row["op"] for row in report["rows"]))
    refused, excused = _refusals(report), excuses(report["rows"])
    notice = paragraph(report["notice"], "notice")
    versions = (
        f"fastlm {env['fastlm']}, commit {env['commit']}; torch {env['torch']}, "
        f"triton {env['triton']}"
    )
    body = ["<h1>fastlm kernels, static report</h1>", paragraph(versions), notice]
    body.append(_headlines(report, refused))
    if refused:
        body.append(listing(refused, "bad"))
    if excused:
        body += [paragraph("Refused by the rules, and accepted:"), listing(excused)]
    if report.get("training"):
        body += _training(report["training"])
    note = (
        "Modelled time, and the share of the roofline: the least bytes or FLOPs of the call at the "
        "part's peak, over that time."
    )
    body += [heading("Each op at a typical size"), paragraph(note), _calls(report, ops)]
    body += [*_roofs(report, ops), *_peers(report)]
    for op in ops:
        body += _op_section(report, op)
    body += [*_launches(report, ops), *_foundations(report), notice]
    return page("fastlm: static kernel report", body)


def _refusals(report: dict[str, Any]) -> list[str]:
    """What the rules refuse, once."""
    refused = []
    for row in report["rows"]:
        where = f"{row['op']} {row['kernel']} {row['target']}"
        refused += [f"{where}: {text}" for text in row.get("refusals", [row.get("error", "")])]
    return list(dict.fromkeys(refused))


def _headlines(report: dict[str, Any], refused: Sequence[str]) -> str:
    ours = [row for row in report["rows"] if row["contender"] == "fused"]
    good = [row for row in ours if "error" not in row]
    targets = len(report["targets"])
    return tiles(
        [
            (str(report["distinct_kernels"]), f"distinct kernels compiled, {targets} targets"),
            (str(sum(row["spills"] > 0 for row in good)), "launches that spill registers"),
            (str(sum(row["float64"] > 0 for row in good)), "launches with float64 instructions"),
            (str(len(refused)), "refusals by the rules"),
            (f"{report['seconds']:g} s", "to compile and read them"),
        ]
    )


def _training(run: dict[str, Any]) -> list[str]:
    """The loss curve of a training run."""
    records = run["records"]
    series = []
    for key, name in (("loss", "train"), ("val_loss", "validation")):
        points = [(float(r["step"]), float(r[key])) for r in records if r.get(key) is not None]
        if points:
            series.append((name, points[:: max(1, len(points) // 400)]))
    facts = [(f"{points[-1][1]:.3f}", f"{name} loss at the end") for name, points in series]
    facts.append((f"{records[-1]['step']:,}", "steps"))
    speeds = sorted(r["tokens_per_second"] for r in records if r.get("tokens_per_second"))
    if speeds:
        facts.append((f"{speeds[len(speeds) // 2]:,.0f}", "tokens a second, median of the run"))
    parts = [
        heading("Training run"),
        paragraph(
            f"From {run['folder']}. These figures are of the run itself, on the machine that "
            "trained it."
        ),
        tiles(facts),
    ]
    if series:
        chart = lines(
            "Loss over training steps",
            series,
            x_label="step",
            y_label="loss (nats a token)",
            width=1160,
            height=300,
        )
        parts.append(card("Loss", "", chart))
    return parts


# --- one op -------------------------------------------------------------------------------------


def typical_case(report: dict[str, Any], op: str) -> str:
    """The op's case in the middle of its sizes."""
    cases = list(dict.fromkeys(row["case"] for row in report["rows"] if row["op"] == op))
    return cases[len(cases) // 2]


def _kernels(report: dict[str, Any], op: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The op's kernels at its typical case: a row of each target, by kernel."""
    case = typical_case(report, op)
    kernels: dict[str, dict[str, dict[str, Any]]] = {}
    for row in report["rows"]:
        if row["op"] == op and row["case"] == case and "error" not in row:
            if row["contender"] != "fused":
                continue
            kernels.setdefault(row["kernel"].strip("_"), {}).setdefault(row["target"], row)
    return kernels


def _op_section(report: dict[str, Any], op: str) -> list[str]:
    """Charts of one op."""
    kernels = _kernels(report, op)
    if not kernels:
        return []
    targets = report["targets"]
    boxes = []
    sweep = _sweep(report, op)
    if sweep:
        note = "The least bytes or FLOPs at the part's peak, over modelled time. Higher is better."
        boxes.append(card("Share of the roofline, forward", note, sweep))
    times = [
        (name, [(target, row["modelled"]["microseconds"]) for target, row in by.items()])
        for name, by in kernels.items()
    ]
    note = f"{typical_case(report, op)}. Dot: simulated. Band: slowest pipe alone, to no overlap."
    chart = ranges(
        f"{op}: modelled microseconds",
        times,
        colours=targets,
        x_label="microseconds, modelled (log scale)",
    )
    boxes.append(card("Modelled time of each kernel", note, chart))
    registers = [
        (name, [(target, row["registers"], _registers(row)) for target, row in by.items()])
        for name, by in kernels.items()
    ]
    chart = bars(f"{op}: registers", registers, limit=255, colours=targets)
    boxes.append(card("Registers a thread", "A full bar is 255, the most there are.", chart))
    occupied = [
        (name, [(target, row["occupancy"], _occupancy(row)) for target, row in by.items()])
        for name, by in kernels.items()
    ]
    chart = bars(f"{op}: occupancy", occupied, limit=1, colours=targets)
    note = "Resident threads of the most a multiprocessor holds, and what limits them."
    boxes.append(card("Occupancy", note, chart))
    return [heading(op), legend(targets), cards(boxes)]


def _registers(row: dict[str, Any]) -> str:
    spilled = f", {row['spills']} spills" if row["spills"] else ""
    return f"{row['registers']}{spilled}"


def _occupancy(row: dict[str, Any]) -> str:
    return f"{row['occupancy']:.0%} {row['occupancy_limiter'].removesuffix(' memory')}"


def _sweep(report: dict[str, Any], op: str) -> str:
    """Share of the roofline over the op's sizes, a line a target."""
    calls = [
        call
        for call in report["calls"]
        if (call["op"], call["pass"], call["contender"]) == (op, "forward", "fused")
        and call.get("roofline_share")
    ]
    cases = list(dict.fromkeys(call["case"] for call in calls))
    if len(cases) < 2:
        return ""
    sizes = [next(call["size"] for call in calls if call["case"] == case) for case in cases]
    names, varying = _short_names(sizes)
    series = []
    for target in report["targets"]:
        points = [
            (float(cases.index(call["case"])), 100 * call["roofline_share"])
            for call in calls
            if call["target"] == target
        ]
        series.append((target, points))
    return lines(
        f"{op}: share of the roofline",
        series,
        x_label=varying,
        y_label="% of the roofline, modelled",
        x_names=names,
        y_range=(0, 100),
        unit="%",
    )


def _short_names(sizes: Sequence[dict[str, Any]]) -> tuple[list[str], str]:
    """What tells sizes apart, in short, and the names of those dimensions."""
    kept: list[str] = []
    for key in dict.fromkeys(key for size in sizes for key in size):
        with_it = {tuple(size.get(k) for k in (*kept, key)) for size in sizes}
        without = {tuple(size.get(k) for k in kept) for size in sizes}
        if len(with_it) > len(without):  # not determined by those before it
            kept.append(key)
    names = [" ".join(_brief(size.get(key)) for key in kept) for size in sizes]
    return names, ", ".join(kept)


def _brief(value: Any) -> str:
    text = str(value)
    if text in ("True", "False"):
        return text[0].lower()
    if text.isdigit() and int(text) >= 1024 and int(text) % 1024 == 0:
        return f"{int(text) // 1024}k"
    return text


# --- tables -------------------------------------------------------------------------------------


def _span(low: float, high: float) -> str:
    return f"{digits(low)} to {digits(high)}"


def _calls(report: dict[str, Any], ops: Sequence[str]) -> str:
    """Modelled forward and backward of each op at its typical size, a column a target."""
    header: list[Cell] = [
        ("op", ""),
        ("inputs", ""),
        ("pass", ""),
        ("whose", ""),
        ("launches", "n"),
    ]
    header += [(f"{target}, {_part(report, target)}", "n") for target in report["targets"]]
    body: list[list[Cell]] = []
    for op in ops:
        for key, by in by_target(report, op, typical_case(report, op)).items():
            direction, contender = key
            launches = next(iter(by.values()))["launches"]
            row: list[Cell] = [(op, ""), (typical_case(report, op), "wide")]
            row += [(direction, ""), (contender, ""), (str(launches), "n")]
            row += [(_modelled(by.get(target)), "n") for target in report["targets"]]
            body.append(row)
    return table(header, body)


def _part(report: dict[str, Any], target: str) -> str:
    """The name of the part that stands for a target, in short."""
    return str(report["parts"][target]["name"]).split("-")[0]


def _modelled(call: dict[str, Any] | None) -> str:
    """Microseconds, and the share of the roofline where it is known."""
    if call is None:
        return ""
    text = ">= " * call["guessed"] + f"{digits(call['microseconds'][1])} us"
    share = call.get("roofline_share")
    return f"{text}, {share:.0%}" if share else text


def _roofs(report: dict[str, Any], ops: Sequence[str]) -> list[str]:
    """Each op's forward at its typical size under the roofline of each target's part."""
    boxes = []
    width = 560 if len(report["targets"]) > 1 else 1160
    for colour, target in enumerate(report["targets"]):
        points = [p for op in ops if (p := _under_the_roof(report, op, target))]
        if points:
            part = report["parts"][target]
            chart = roofline(
                f"{target}: forwards under the roofline",
                part["dram_gbs"] * 1e9,
                list(part["peak_flops"].items()),
                points,
                colour=colour,
                width=width,
            )
            boxes.append(card(f"{target}, {part['name']}", "", chart))
    if not boxes:
        return []
    note = (
        "Modelled FLOPs a second against the FLOPs for each byte that the call must move; the line "
        "is the least of the part's memory and its products in half precision (and in float8 where "
        "a kernel uses them), at their nominal rates. Ringed in red: a peer's forward is modelled "
        "faster. Ops that only move numbers have no FLOPs, and no dot."
    )
    return [heading("Under the roofline"), paragraph(note), cards(boxes)]


def _under_the_roof(report: dict[str, Any], op: str, target: str) -> Point | None:
    """An op's forward at its typical size, where its FLOPs and bytes are known."""
    calls = by_target(report, op, typical_case(report, op))
    ours = calls.get(("forward", "fused"), {}).get(target)
    if ours is None or not ours.get("work_flops") or not ours["microseconds"][1]:
        return None
    time = ours["microseconds"][1]
    speed = ours["work_flops"] / time * 1e6
    theirs = [by[target] for (d, who), by in calls.items() if d == "forward" and target in by]
    share = ours["roofline_share"]
    return Point(
        op,
        ours["work_flops"] / ours["least_bytes"],
        speed,
        f"{ours['case']}: {human(speed)}FLOP/s in {digits(time)} us, {share:.0%} of the roofline",
        any(call["microseconds"][1] < time for call in theirs),
    )


def _peers(report: dict[str, Any]) -> list[str]:
    """Ours against peers, losses as plain as wins; nothing where no peer was compiled."""
    rows = against_peers(report)
    missing = [f"{name}: {why}" for name, why in report.get("missing_peers", {}).items()]
    if not rows:
        return [listing(missing)] if missing else []
    header: list[Cell] = [("op", ""), ("inputs", ""), ("pass", ""), ("peer", "")]
    header += [(f"{target}, {_part(report, target)}", "n") for target in report["targets"]]
    body: list[list[Cell]] = []
    kinds = {"win": "n good", "loss": "n bad", "": "n"}
    for found in rows:
        row: list[Cell] = [(found["op"], ""), (found["case"], "wide"), (found["pass"], "")]
        row.append((found["peer"], ""))
        for target in report["targets"]:
            ratio = found["ratios"].get(target)
            row.append((f"{ratio:.2f}x" if ratio else "", kinds[verdict(ratio)]))
        body.append(row)
    return [
        heading("Against peers"),
        paragraph(in_words(rows)),
        table(header, body),
        listing(missing),
    ]


def _launches(report: dict[str, Any], ops: Sequence[str]) -> list[str]:
    """Every launch on every target, to be filtered."""
    header: list[Cell] = [("op", ""), ("kernel", ""), ("target", "")]
    numbers = ("regs", "spills", "shared B", "blocks/SM", "occupancy", "f64", "barriers", "us")
    header += [(name, "n") for name in (*numbers, "range")]
    words = ("bound by", "tensor cores", "accesses (n x bits)", "inputs", "variant")
    header += [(name, "") for name in words]
    keys = [{k: row[k] for k in ("op", "target", "pass")} for row in report["rows"]]
    choices = {"op": ops, "target": report["targets"], "pass": ("forward", "backward")}
    body = [_launch_cells(row) for row in report["rows"]]
    return [heading("Every launch"), filters(choices), table(header, body, keys=keys)]


def _launch_cells(row: dict[str, Any]) -> list[Cell]:
    whose = "" if row["contender"] == "fused" else f"{row['contender']}: "
    first: list[Cell] = [(row["op"], ""), (whose + row["kernel"], ""), (row["target"], "")]
    variant = " ".join(f"{k}={v}" for k, v in {**row["variant"], **row["options"]}.items())
    last: list[Cell] = [(row["case"], "wide"), (variant, "wide")]
    if "error" in row:
        return [*first, (row["error"], "bad"), *[("", "")] * 11, *last]
    low, middle, high = row["modelled"]["microseconds"]
    spills: Cell = (str(row["spills"]), "n bad" if row["spills"] else "n")
    figures = (
        f"{row['shared']:,}",
        str(row["blocks_per_sm"]),
        f"{row['occupancy']:.0%}",
        str(row["float64"]),
        str(row["barriers"]),
        digits(middle),
        _span(low, high),
    )
    tensor = " ".join(f"{n} {name}" for name, n in row["tensor"].items())
    return [
        *first,
        (str(row["registers"]), "n"),
        spills,
        *((figure, "n") for figure in figures),
        (row["modelled"]["bound"], ""),
        (tensor, ""),
        (accesses_in_short(row), "small"),
        *last,
    ]


def _foundations(report: dict[str, Any]) -> list[str]:
    """Environment, parts and assumptions."""
    env = [[(k, ""), (str(v), "wide")] for k, v in report["environment"].items() if v is not None]
    parts = [
        [
            (target, ""),
            (part["name"], ""),
            (str(part["multiprocessors"]), "n"),
            (str(part["megahertz"]), "n"),
            (str(part["dram_gbs"]), "n"),
        ]
        for target, part in report["parts"].items()
    ]
    columns: list[Cell] = [("target", ""), ("part", "")]
    columns += [(name, "n") for name in ("multiprocessors", "MHz", "GB/s")]
    return [
        heading("What the figures rest on"),
        cards([table([("what", ""), ("version", "")], env), table(columns, parts)]),
        paragraph(
            "Registers, spills, memory and instructions are read off the machine code and are "
            "facts. Times are modelled: against published measurements of other kernels the "
            "simulated figure errs by about 14 % on tensor-core kernels and 8 % on streaming "
            "ones, more on small sizes."
        ),
        listing(report["assumptions"]),
    ]
