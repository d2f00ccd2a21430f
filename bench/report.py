"""The static report as one HTML page: charts, the kernel table, environment. Needs no network."""

from collections.abc import Sequence
from html import escape
from typing import Any

from .charts import bars, legend, lines, ranges
from .static import _number, _widths, human

_STYLE = """
:root { color-scheme: light dark; --page:#fbfbfa; --card:#fff; --ink:#1c1d1f; --soft:#63666b;
  --rule:#e3e3e0; --track:#f0f0ed; --warn:#8a4b00; --warn-bg:#fff4e0; --bad:#b3261e;
  --s0:#2a6fdb; --s1:#c2570c; --s2:#0f8a78; --s3:#8250df; --s4:#b3307f; --s5:#5f6b00; }
@media (prefers-color-scheme: dark) { :root { --page:#131416; --card:#1b1d20; --ink:#e8e8e6;
  --soft:#a0a4aa; --rule:#303338; --track:#26292d; --warn:#ffd08a; --warn-bg:#3a2c12; --bad:#ff8a80;
  --s0:#6aa5ff; --s1:#ff9a57; --s2:#4fd1bd; --s3:#b99bff; --s4:#ff8fc8; --s5:#c6d35a; } }
* { box-sizing: border-box }
body { margin:0; background:var(--page); color:var(--ink);
  font:15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width:1240px; margin:0 auto; padding:28px 24px 64px }
h1 { font-size:26px; margin:0 0 4px; letter-spacing:-.01em } h2 { font-size:19px; margin:40px 0 4px }
h3 { font-size:15px; margin:0 0 8px } p { margin:4px 0 12px; max-width:80ch } .soft { color:var(--soft) }
.notice { background:var(--warn-bg); color:var(--warn); border-radius:8px; padding:10px 14px;
  font-weight:600; margin:16px 0; max-width:none }
.tiles { display:flex; flex-wrap:wrap; gap:12px; margin:16px 0 }
.tile { background:var(--card); border:1px solid var(--rule); border-radius:10px; padding:12px 16px; min-width:150px; flex:1 }
.tile b { display:block; font-size:24px; font-weight:650; line-height:1.2 } .tile span { color:var(--soft); font-size:13px }
.grid2 { display:grid; grid-template-columns:repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap:16px }
.card { background:var(--card); border:1px solid var(--rule); border-radius:10px; padding:16px 18px; min-width:0 }
svg { width:100%; height:auto; display:block } svg text { fill:var(--soft); font-size:12px }
svg .group { fill:var(--ink); font-size:12.5px } svg .axis { font-size:12px } svg .grid { stroke:var(--rule); stroke-width:1 }
svg .line { fill:none; stroke-width:2; stroke-linejoin:round } svg .dot { stroke:var(--card); stroke-width:1.5 }
svg .track { fill:var(--track) } svg .range { opacity:.35 } svg .name { font-size:12px; font-weight:600 }
.legend { display:flex; flex-wrap:wrap; gap:4px 16px; font-size:13px; color:var(--soft); margin:2px 0 10px }
.legend i { display:inline-block; width:10px; height:10px; border-radius:3px; margin-right:6px }
.scroll { overflow-x:auto; margin-top:10px } table { border-collapse:collapse; width:100%; font-size:13px; font-variant-numeric:tabular-nums }
th { text-align:left; color:var(--soft); font-weight:600; white-space:nowrap; border-bottom:1px solid var(--rule); padding:6px 10px 6px 0 }
td { border-bottom:1px solid var(--rule); padding:5px 10px 5px 0; white-space:nowrap } td.n, th.n { text-align:right }
td small { color:var(--soft) } td.wrap { white-space:normal; min-width:240px } .bad { color:var(--bad); font-weight:600 }
.controls { display:flex; flex-wrap:wrap; gap:10px; margin:12px 0 } select, input { font:inherit; font-size:14px; padding:5px 9px;
  color:var(--ink); background:var(--card); border:1px solid var(--rule); border-radius:7px }
li { margin:2px 0; max-width:90ch } code { font-size:13px }
"""

_SCRIPT = """
const rows = [...document.querySelectorAll("#kernels tbody tr")];
const picks = [...document.querySelectorAll("[data-pick]")];
const found = document.getElementById("found");
function show() {
  let shown = 0;
  for (const row of rows) {
    const ok = picks.every(p => !p.value || (p.tagName === "INPUT"
      ? row.textContent.toLowerCase().includes(p.value.toLowerCase())
      : row.dataset[p.dataset.pick] === p.value));
    row.hidden = !ok;
    shown += ok;
  }
  found.textContent = shown + " of " + rows.length + " rows";
}
picks.forEach(p => p.addEventListener("input", show));
show();
"""


def _colours() -> str:
    rules = []
    for i in range(6):
        rules.append(
            f"svg .line.s{i} {{ stroke:var(--s{i}) }} .legend i.s{i} {{ background:var(--s{i}) }}"
        )
        rules.append(
            f"svg .dot.s{i}, svg .bar.s{i}, svg .range.s{i}, svg .name.s{i} {{ fill:var(--s{i}) }}"
        )
    return "\n".join(rules)


def _card(title: str, note: str, body: str) -> str:
    return (
        f'<div class="card"><h3>{escape(title)}</h3><p class="soft">{escape(note)}</p>{body}</div>'
    )


def _tile(value: str, words: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(words)}</span></div>'


def _training(run: dict[str, Any]) -> str:
    """The loss curve of a training run."""
    records = run["records"]
    series = []
    for key, name in (("loss", "train"), ("val_loss", "validation")):
        points = [(float(r["step"]), float(r[key])) for r in records if r.get(key) is not None]
        if points:
            series.append((name, points[:: max(1, len(points) // 400)]))
    speeds = sorted(r["tokens_per_second"] for r in records if r.get("tokens_per_second"))
    tiles = [_tile(f"{points[-1][1]:.3f}", f"{name} loss at the end") for name, points in series]
    tiles.append(_tile(f"{records[-1]['step']:,}", "steps"))
    if speeds:
        tiles.append(
            _tile(f"{speeds[len(speeds) // 2]:,.0f}", "tokens a second (median, as trained)")
        )
    chart = (
        lines(
            "Loss over training steps",
            series,
            x_label="step",
            y_label="loss (nats a token)",
            width=1160,
            height=300,
        )
        if series
        else ""
    )
    return (
        f"<h2>Training run</h2><p class='soft'>From <code>{escape(str(run['folder']))}</code>. "
        "These figures are of the run itself, on the machine that trained it.</p>"
        f'<div class="tiles">{"".join(tiles)}</div><div class="card">{chart}</div>'
    )


def _typical(report: dict[str, Any], op: str) -> str:
    """The op's case in the middle of its sizes."""
    cases = list(dict.fromkeys(r["case"] for r in report["rows"] if r["op"] == op))
    return cases[len(cases) // 2]


def _groups(report: dict[str, Any], op: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The op's kernels at its typical case: the first row of each target, by kernel."""
    case = _typical(report, op)
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in report["rows"]:
        if row["op"] == op and row["case"] == case and "error" not in row:
            groups.setdefault(row["kernel"], {}).setdefault(row["target"], row)
    return groups


def _op_section(report: dict[str, Any], op: str) -> str:
    """Charts of one op."""
    targets = report["targets"]
    groups = _groups(report, op)
    case = _typical(report, op)
    cards = []
    sweep = _sweep(report, op)
    if sweep:
        cards.append(
            _card(
                "Share of the roofline, forward",
                "Least bytes or FLOPs at the part's peak, over modelled time; higher is better.",
                sweep,
            )
        )
    times = [
        (kernel, [(t, tuple(row["modelled"]["microseconds"])) for t, row in by.items()])
        for kernel, by in groups.items()
    ]
    cards.append(
        _card(
            "Modelled time of each kernel",
            f"{case}. Dot: simulated. Band: from the slowest pipe alone to no overlap at all.",
            ranges(
                f"{op}: modelled microseconds",
                times,
                colours=targets,
                x_label="microseconds, modelled (log scale)",
            ),
        )
    )
    registers = [
        (
            k,
            [
                (
                    t,
                    r["registers"],
                    f"{r['registers']}" + (f", {r['spills']} spills" if r["spills"] else ""),
                )
                for t, r in by.items()
            ],
        )
        for k, by in groups.items()
    ]
    cards.append(
        _card(
            "Registers a thread",
            "The bar is full at 255, the most that a thread can have.",
            bars(f"{op}: registers", registers, limit=255, colours=targets),
        )
    )
    occupancy = [
        (
            k,
            [
                (t, r["occupancy"], f"{r['occupancy']:.0%} {r['occupancy_limiter']}")
                for t, r in by.items()
            ],
        )
        for k, by in groups.items()
    ]
    cards.append(
        _card(
            "Occupancy",
            "Threads resident on a multiprocessor, of the most it holds, and what limits them.",
            bars(f"{op}: occupancy", occupancy, limit=1, colours=targets),
        )
    )
    return f'<h2>{escape(op)}</h2>{legend(targets)}<div class="grid2">{"".join(cards)}</div>'


def _sweep(report: dict[str, Any], op: str) -> str:
    """Share of the roofline over the op's sizes, a line a target."""
    calls = [
        c
        for c in report["calls"]
        if c["op"] == op and c["pass"] == "forward" and c.get("roofline_share")
    ]
    cases = list(dict.fromkeys(c["case"] for c in calls))
    if len(cases) < 2:
        return ""
    names = _short_names([next(c["size"] for c in calls if c["case"] == case) for case in cases])
    series = []
    for target in report["targets"]:
        points = [
            (float(cases.index(c["case"])), 100 * c["roofline_share"])
            for c in calls
            if c["target"] == target
        ]
        series.append((target, points))
    varying = names[1]
    return lines(
        f"{op}: share of the roofline",
        series,
        x_label=varying,
        y_label="% of roofline, modelled",
        x_names=names[0],
        y_range=(0, 100),
        unit="%",
    )


def _short_names(sizes: Sequence[dict[str, Any]]) -> tuple[list[str], str]:
    """What tells sizes apart, and its name."""
    keys = [
        k for k in dict.fromkeys(k for s in sizes for k in s) if len({s.get(k) for s in sizes}) > 1
    ]
    # a dimension that another one determines says nothing new
    kept = []
    for key in keys:
        if len({tuple(s.get(k) for k in [*kept, key]) for s in sizes}) > len(
            {tuple(s.get(k) for k in kept) for s in sizes}
        ):
            kept.append(key)
    names = ["·".join(_brief(s.get(k)) for k in kept) for s in sizes]
    return names, " · ".join(kept)


def _brief(value: Any) -> str:
    text = str(value)
    if text in ("True", "False"):
        return "T" if text == "True" else "F"
    if text.isdigit() and int(text) >= 1024 and int(text) % 1024 == 0:
        return f"{int(text) // 1024}k"
    return text


def _kernel_table(report: dict[str, Any]) -> str:
    header = [
        ("op", ""),
        ("kernel", ""),
        ("target", ""),
        ("inputs", ""),
        ("variant", ""),
        ("regs", "n"),
        ("spills", "n"),
        ("shared B", "n"),
        ("blocks/SM", "n"),
        ("occupancy", "n"),
        ("tensor cores", ""),
        ("global accesses (n x bits)", ""),
        ("f64", "n"),
        ("barriers", "n"),
        ("modelled us", "n"),
        ("range", "n"),
        ("bound by", ""),
    ]
    head = "".join(f'<th class="{kind}">{escape(name)}</th>' for name, kind in header)
    body = []
    for row in report["rows"]:
        data = " ".join(f'data-{k}="{escape(row[k])}"' for k in ("op", "target", "pass"))
        body.append(f"<tr {data}>{_table_cells(row)}</tr>")

    def options(values: Sequence[str], every: str) -> str:
        return f'<option value="">{every}</option>' + "".join(
            f"<option>{escape(v)}</option>" for v in values
        )

    ops = list(dict.fromkeys(r["op"] for r in report["rows"]))
    controls = (
        f'<div class="controls"><select data-pick="op" aria-label="op">{options(ops, "every op")}</select>'
        f'<select data-pick="target" aria-label="target">{options(report["targets"], "every target")}</select>'
        f'<select data-pick="pass" aria-label="pass">{options(["forward", "backward"], "both passes")}</select>'
        '<input data-pick="text" placeholder="search" aria-label="search"><span class="soft" id="found"></span></div>'
    )
    return f'<h2>Every launch</h2>{controls}<div class="card scroll"><table id="kernels"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _table_cells(row: dict[str, Any]) -> str:
    variant = " ".join(f"{k}={v}" for k, v in {**row["variant"], **row["options"]}.items())
    first = [row["op"], row["kernel"], row["target"], f"{row['case']}", variant]
    cells = [f"<td>{escape(c)}</td>" for c in first[:3]] + [
        f"<td><small>{escape(c)}</small></td>" for c in first[3:]
    ]
    if "error" in row:
        return "".join(cells) + f'<td class="bad" colspan="12">{escape(row["error"])}</td>'
    low, middle, high = row["modelled"]["microseconds"]
    spills = f'<td class="n bad">{row["spills"]}</td>' if row["spills"] else '<td class="n">0</td>'
    cells += [f'<td class="n">{row["registers"]}</td>', spills]
    cells += [
        f'<td class="n">{v}</td>'
        for v in (f"{row['shared']:,}", row["blocks_per_sm"], f"{row['occupancy']:.0%}")
    ]
    tensor = " ".join(f"{n} {name}" for name, n in row["tensor"].items())
    cells += [f"<td>{escape(tensor)}</td><td><small>{escape(_widths(row))}</small></td>"]
    cells += [
        f'<td class="n">{v}</td>'
        for v in (
            row["float64"],
            row["barriers"],
            _number(middle),
            f"{_number(low)} to {_number(high)}",
        )
    ]
    return "".join(cells) + f"<td>{escape(row['modelled']['bound'])}</td>"


def _calls_table(report: dict[str, Any]) -> str:
    """Modelled forward and backward of each op at its typical size."""
    head = "".join(
        f"<th class='{k}'>{n}</th>"
        for n, k in (
            ("op", ""),
            ("inputs", ""),
            ("target", ""),
            ("pass", ""),
            ("launches", "n"),
            ("modelled us", "n"),
            ("range", "n"),
            ("bytes moved", "n"),
            ("bytes needed", "n"),
            ("of the roofline", "n"),
        )
    )
    body = []
    for op in dict.fromkeys(r["op"] for r in report["rows"]):
        case = _typical(report, op)
        for c in report["calls"]:
            if c["op"] == op and c["case"] == case:
                low, middle, high = c["microseconds"]
                least = human(c["least_bytes"]) + "B" if "least_bytes" in c else ""
                share = f"{c['roofline_share']:.0%}" if c.get("roofline_share") else ""
                body.append(
                    f"<tr><td>{escape(op)}</td><td><small>{escape(case)}</small></td><td>{c['target']}</td><td>{c['pass']}</td><td class='n'>{c['launches']}</td>"
                    f"<td class='n'>{_number(middle)}</td><td class='n'>{_number(low)} to {_number(high)}</td><td class='n'>{human(c['bytes'])}B</td><td class='n'>{least}</td><td class='n'>{share}</td></tr>"
                )
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _facts(report: dict[str, Any]) -> str:
    env = {k: v for k, v in report["environment"].items() if v is not None}
    items = "".join(
        f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in env.items()
    )
    parts = "".join(
        f"<tr><td>{t}</td><td>{escape(p['name'])}, {p['multiprocessors']} multiprocessors at {p['megahertz']} MHz, {p['dram_gbs']} GB/s</td></tr>"
        for t, p in report["parts"].items()
    )
    assumptions = "".join(f"<li>{escape(a)}</li>" for a in report["assumptions"])
    return (
        f'<h2>What the figures rest on</h2><div class="grid2"><div class="card"><h3>Environment</h3><table>{items}</table></div>'
        f'<div class="card"><h3>Parts that stand for the targets</h3><table>{parts}</table></div></div>'
        f"<h3 style='margin-top:24px'>Assumptions of the model</h3><ul>{assumptions}</ul>"
        "<p class='soft'>Registers, spills, memory and instructions are read off the machine code and are facts. "
        "Times are modelled: against published measurements of other kernels the simulated figure errs by about 14 % "
        "on tensor-core kernels and 8 % on streaming ones, more on small sizes.</p>"
    )


def html(report: dict[str, Any]) -> str:
    """The page of a static report."""
    rows = report["rows"]
    good = [r for r in rows if "error" not in r]
    refused = [t for r in rows for t in r.get("refusals", [r.get("error", "")])]
    notice = f'<p class="notice">{escape(report["notice"])}</p>'
    tiles = "".join(
        (
            _tile(
                f"{report['distinct_kernels']}",
                f"distinct kernels compiled, {len(report['targets'])} targets",
            ),
            _tile(f"{sum(r['spills'] > 0 for r in good)}", "launches that spill registers"),
            _tile(f"{sum(r['float64'] > 0 for r in good)}", "launches with float64 instructions"),
            _tile(f"{len(refused)}", "refusals by the rules"),
            _tile(f"{report['seconds']:g} s", "to compile and read them"),
        )
    )
    refusals = "".join(f"<li class='bad'>{escape(t)}</li>" for t in dict.fromkeys(refused))
    sections = "".join(_op_section(report, op) for op in dict.fromkeys(r["op"] for r in good))
    env = report["environment"]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>fastlm: static kernel report</title><style>{_STYLE}{_colours()}</style></head><body><main>"
        f"<h1>fastlm kernels, static report</h1><p class='soft'>fastlm {escape(env['fastlm'])}, commit {escape(env['commit'])}; "
        f"torch {escape(env['torch'])}, triton {escape(env['triton'])}</p>{notice}<div class='tiles'>{tiles}</div>"
        + (f"<ul>{refusals}</ul>" if refusals else "")
        + (_training(report["training"]) if report.get("training") else "")
        + "<h2>Each op at a typical size</h2>"
        + _calls_table(report)
        + sections
        + _kernel_table(report)
        + _facts(report)
        + notice
        + f"</main><script>{_SCRIPT}</script></body></html>\n"
    )
