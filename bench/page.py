"""The page that reports share: style, parts and script. One file, no network, light and dark."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .charts import element

_COLOURS = 10

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #fff; --ink: #1c1d1f; --soft: #63666b; --rule: #e3e3e0;
  --track: #f0f0ed; --warn: #8a4b00; --warn-bg: #fff4e0; --bad: #b3261e; --good: #116b3a;
  --s0: #2a6fdb; --s1: #c2570c; --s2: #0f8a78; --s3: #8250df; --s4: #b3307f; --s5: #5f6b00;
  --s6: #8a5a2b; --s7: #4b5563; --s8: #00809c; --s9: #b02a37;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131416; --card: #1b1d20; --ink: #e8e8e6; --soft: #a0a4aa; --rule: #303338;
    --track: #26292d; --warn: #ffd08a; --warn-bg: #3a2c12; --bad: #ff8a80; --good: #6fd39b;
    --s0: #6aa5ff; --s1: #ff9a57; --s2: #4fd1bd; --s3: #b99bff; --s4: #ff8fc8; --s5: #c6d35a;
    --s6: #d9a878; --s7: #aab4c2; --s8: #5cc8e0; --s9: #ff8b94;
  }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 64px }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -.01em }
h2 { font-size: 19px; margin: 40px 0 6px }
h3 { font-size: 15px; margin: 0 0 6px }
p { margin: 4px 0 12px; max-width: 90ch }
li { margin: 2px 0; max-width: 95ch }
.soft { color: var(--soft) } .bad { color: var(--bad); font-weight: 600 }
.good { color: var(--good); font-weight: 600 }
.notice { background: var(--warn-bg); color: var(--warn); border-radius: 8px;
  padding: 10px 14px; font-weight: 600; margin: 16px 0; max-width: none }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0 }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 12px 16px; min-width: 150px; flex: 1 }
.tile b { display: block; font-size: 24px; font-weight: 650; line-height: 1.2 }
.tile span { color: var(--soft); font-size: 13px }
.cards { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)) }
.cards > .card:first-child:nth-last-child(3) { grid-row: span 2; align-self: start }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 16px 18px; min-width: 0; overflow-x: auto }
svg { width: 100%; height: auto; display: block }
svg text { fill: var(--soft); font-size: 12px } svg .group { fill: var(--ink); font-size: 12.5px }
svg .grid { stroke: var(--rule) } svg .track { fill: var(--track) } svg .range { opacity: .35 }
svg .mark { stroke: var(--ink); stroke-dasharray: 3 3 }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round }
svg .lost { fill: none; stroke: var(--bad); stroke-width: 2 }
svg .dot { stroke: var(--card); stroke-width: 1.5 } svg .name { font-weight: 600 }
svg .over { stroke: var(--card); stroke-width: 4; paint-order: stroke }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--soft);
  margin: 2px 0 10px }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px;
  margin-right: 6px }
table { border-collapse: collapse; width: 100%; font-size: 13px;
  font-variant-numeric: tabular-nums }
th { text-align: left; color: var(--soft); font-weight: 600; white-space: nowrap }
th, td { border-bottom: 1px solid var(--rule); padding: 5px 12px 5px 0; vertical-align: top }
td { white-space: nowrap } td small { color: var(--soft) }
td.wide { white-space: normal; min-width: 260px }
td.n, th.n { text-align: right }
.controls { display: flex; flex-wrap: wrap; gap: 10px; margin: 12px 0; align-items: center }
select, input { font: inherit; font-size: 14px; padding: 5px 9px; color: var(--ink);
  background: var(--card); border: 1px solid var(--rule); border-radius: 7px }
code { font-size: 13px }
"""

_SCRIPT = """
const rows = [...document.querySelectorAll("#rows tbody tr")];
const picks = [...document.querySelectorAll("[data-pick]")];
const found = document.getElementById("found");
function matches(row, pick) {
  if (!pick.value) return true;
  if (pick.tagName === "INPUT") {
    return row.textContent.toLowerCase().includes(pick.value.toLowerCase());
  }
  return row.dataset[pick.dataset.pick] === pick.value;
}
function show() {
  let shown = 0;
  for (const row of rows) {
    row.hidden = !picks.every(pick => matches(row, pick));
    shown += !row.hidden;
  }
  found.textContent = shown + " of " + rows.length + " rows";
}
picks.forEach(pick => pick.addEventListener("input", show));
if (found) show();
"""


def _colours() -> str:
    rules = []
    for i in range(_COLOURS):
        rules.append(f"svg .line.s{i} {{ stroke: var(--s{i}) }}")
        rules.append(f".legend i.s{i} {{ background: var(--s{i}) }}")
        kinds = ", ".join(f"svg .{kind}.s{i}" for kind in ("dot", "bar", "range", "name"))
        rules.append(f"{kinds} {{ fill: var(--s{i}) }}")
    return "\n".join(rules)


def page(title: str, body: Iterable[str], data: Mapping[str, Any] | None = None) -> str:
    """A whole document around the parts of its body, and the report itself as JSON if given."""
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        + element("title", escape(title))
        + element("style", _STYLE + _colours())
    )
    content = element("main", "".join(body)) + element("script", _SCRIPT)
    if data is not None:
        text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # ends no script early
        content += element("script", text, type="application/json", id="report")
    document = element("head", head) + element("body", content)
    return "<!doctype html>" + element("html", document, lang="en") + "\n"


def heading(words: str) -> str:
    """A section's heading."""
    return element("h2", escape(words))


def paragraph(words: str, kind: str = "soft") -> str:
    """A paragraph of plain words."""
    return element("p", escape(words), class_=kind)


def tiles(facts: Iterable[tuple[str, str]]) -> str:
    """Headline figures, each with what it counts."""
    made = [
        element("div", element("b", escape(value)) + element("span", escape(words)), class_="tile")
        for value, words in facts
    ]
    return element("div", "".join(made), class_="tiles")


def card(title: str, note: str, body: str) -> str:
    """A titled box."""
    head = element("h3", escape(title)) + (paragraph(note) if note else "")
    return element("div", head + body, class_="card")


def cards(boxes: Iterable[str]) -> str:
    """Boxes side by side where there is room."""
    return element("div", "".join(boxes), class_="cards")


Cell = tuple[str, str]  # words, and how they are set: "", "n" (a number), "small", "wide", "bad"


def _cell(words: str, kind: str) -> str:
    text = escape(words)
    if kind in ("small", "wide"):
        return element("td", element("small", text), class_=kind)
    return element("td", text, class_=kind)


def table(
    header: Sequence[Cell],
    body: Iterable[Sequence[Cell]],
    *,
    keys: Iterable[dict[str, str]] | None = None,
) -> str:
    """A table in a box.

    Args:
        header: Names of the columns.
        body: Rows of cells.
        keys: For each row what the page's filters compare; the table is then the filtered one.
    """
    head = "".join(element("th", escape(words), class_=kind) for words, kind in header)
    rows = ["".join(_cell(*cell) for cell in row) for row in body]
    if keys is None:
        made = [element("tr", row) for row in rows]
    else:
        attributes = [{f"data-{k}": v for k, v in key.items()} for key in keys]
        made = [element("tr", row, **a) for row, a in zip(rows, attributes, strict=True)]
    parts = element("thead", element("tr", head)) + element("tbody", "".join(made))
    named = {} if keys is None else {"id": "rows"}
    return element("div", element("table", parts, **named), class_="card")


def filters(choices: Mapping[str, Sequence[str]]) -> str:
    """Controls that narrow the filtered table: a choice for each key, and a search."""
    parts = []
    for key, values in choices.items():
        options = element("option", f"every {escape(key)}", value="")
        options += "".join(element("option", escape(value)) for value in values)
        parts.append(element("select", options, data_pick=key, aria_label=key))
    parts.append(element("input", data_pick="text", placeholder="search", aria_label="search"))
    parts.append(element("span", "", class_="soft", id="found"))
    return element("div", "".join(parts), class_="controls")


def listing(items: Iterable[str], kind: str = "") -> str:
    """A bulleted list."""
    return element("ul", "".join(element("li", escape(item), class_=kind) for item in items))
