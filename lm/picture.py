"""Pictures of a run as SVG, which any browser shows."""

import html
import math
from collections.abc import Callable, Mapping, Sequence

Points = Sequence[tuple[float, float]]
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 720, 400, 64, 48, 20, 48
_COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#334155}.title{font-size:15px;font-weight:600}"
    ".grid{stroke:#e2e8f0}.axis{stroke:#94a3b8}path{fill:none;stroke-width:2;"
    "stroke-linejoin:round}"
)


def line_chart(title: str, x_label: str, y_label: str, lines: Mapping[str, Points]) -> str:
    """Lines over common axes, each named in a legend, as an SVG document.

    Raises:
        ValueError: No line has a finite point.
    """
    lines = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in lines.items()
    }
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    if not xs:
        raise ValueError("line_chart: lines must hold a finite point")
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_of = _scale(x_ticks[0], x_ticks[-1], _LEFT, _WIDTH - _RIGHT)
    y_of = _scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    parts = [f'<text class="title" x="{_LEFT}" y="24">{html.escape(title)}</text>']
    for y in y_ticks:
        at = y_of(y)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
    below = _HEIGHT - _BOTTOM
    parts += [
        f'<text x="{x_of(x):.1f}" y="{below + 18}" text-anchor="middle">{x:g}</text>'
        for x in x_ticks
    ]
    parts.append(f'<path class="axis" d="M{_LEFT} {below}H{_WIDTH - _RIGHT}"/>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    parts.append(
        f'<text transform="translate(16 {(_TOP + below) / 2}) rotate(-90)" '
        f'text-anchor="middle">{html.escape(y_label)}</text>'
    )
    legend = _WIDTH - _RIGHT
    for (name, points), colour in reversed(list(zip(lines.items(), _COLOURS, strict=False))):
        path = "L".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y in points)
        if points:
            parts.append(f'<path stroke="{colour}" d="M{path}"/>')
        if len(points) <= 40:
            parts += [
                f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3" fill="{colour}"/>'
                for x, y in points
            ]
        legend -= 8 * len(name) + 26
        parts.append(f'<rect x="{legend}" y="14" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{legend + 16}" y="24">{html.escape(name)}</text>')
    return document(_WIDTH, _HEIGHT, parts)


def document(width: int, height: int, parts: Sequence[str]) -> str:
    """SVG elements as a document on white."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><style>{_STYLE}</style>'
        f'<rect width="{width}" height="{height}" fill="white"/>{"".join(parts)}</svg>\n'
    )


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``."""
    if high <= low:
        high = low + 1
    raw = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)
