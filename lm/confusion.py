"""A classifier's confusion matrix as a picture."""

import html
from collections.abc import Sequence

from .picture import document

_CELL, _TOP, _RIGHT = 44, 72, 24


def confusion_chart(matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    """A table of what texts are (rows) and what they are called (columns), as an SVG document.

    A cell is as dark as its share of the row, and its number is that share in percent; hovering
    tells the count.
    """
    left = 40 + 8 * max(map(len, labels))
    top = _TOP + 6 * max(map(len, labels))
    size = _CELL * len(labels)
    parts = [
        '<text class="title" x="20" y="26">What texts are called, % of each class</text>',
        f'<text x="20" y="{top - 12}">is</text>',
        f'<text x="{left + size - 4}" y="46" text-anchor="end">called</text>',
    ]
    for i, (label, row) in enumerate(zip(labels, matrix, strict=True)):
        y = top + i * _CELL
        name = html.escape(label)
        parts.append(f'<text x="{left - 8}" y="{y + 27}" text-anchor="end">{name}</text>')
        x = left + i * _CELL + 26
        parts.append(f'<text transform="translate({x} {top - 8}) rotate(-55)">{name}</text>')
        for j, count in enumerate(row):
            share = count / max(1, sum(row))
            parts.append(
                f"<g><title>{name} called {html.escape(labels[j])}: {count}</title>"
                f'<rect x="{left + j * _CELL}" y="{y}" width="{_CELL - 2}" height="{_CELL - 2}" '
                f'fill="{_shade(share)}"/>'
            )
            if count:
                ink = "#fff" if share > 0.5 else "#334155"
                parts.append(
                    f'<text x="{left + j * _CELL + 21}" y="{y + 26}" text-anchor="middle" '
                    f'style="fill:{ink}">{100 * share:.0f}</text>'
                )
            parts.append("</g>")
    return document(left + size + _RIGHT + 40, top + size + 20, parts)


def _shade(share: float) -> str:
    """From almost white to blue."""
    pale, full = (241, 245, 249), (29, 78, 216)
    mixed = (round(a + (b - a) * share**0.7) for a, b in zip(pale, full, strict=True))
    return "rgb({},{},{})".format(*mixed)
