"""Charts as inline SVG: lines, grouped bars and ranges. Colours come from the page's style sheet."""

import math
from collections.abc import Sequence
from html import escape

Series = tuple[str, Sequence[tuple[float, float]]]


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover low to high."""
    if high <= low:
        high = low + 1
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw)
    first = math.floor(low / step)
    return [k * step for k in range(first, math.ceil(high / step - 1e-9) + 1)]


def _plain(value: float) -> str:
    if abs(value) >= 10000:
        return f"{value / 1000:g}k"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _spread(
    labels: list[tuple[float, str, int]], gap: float, top: float
) -> list[tuple[float, str, int]]:
    """Labels at (y, words, colour) moved down until none covers another."""
    placed: list[tuple[float, str, int]] = []
    for y, words, colour in sorted(labels):
        floor = placed[-1][0] + gap if placed else top
        placed.append((max(y, floor), words, colour))
    return placed


def lines(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_names: Sequence[str] = (),
    y_range: tuple[float, float] | None = None,
    unit: str = "",
    width: float = 560,
    height: float = 260,
) -> str:
    """A line for each series, named at its right end.

    Args:
        title: For readers who cannot see the chart.
        series: Names, each with its (x, y) points.
        x_label: Under the axis.
        y_label: Above the axis.
        x_names: Words for x = 0, 1, 2 and so on, in place of numbers.
        y_range: Lowest and highest y to show.
        unit: After each number in the tooltips.
        width: In pixels, at full size.
        height: In pixels, at full size.
    """
    left, right, top, bottom = 52.0, 74.0, 30.0, 42.0
    xs = [x for _, points in series for x, _ in points]
    ys = [y for _, points in series for _, y in points]
    ticks = _ticks(*(y_range or (min(ys), max(ys))))
    x0, x1 = min(xs), max(max(xs), min(xs) + 1e-9)
    y0, y1 = ticks[0], ticks[-1]

    def px(x: float) -> float:
        return left + (x - x0) / (x1 - x0) * (width - left - right)

    def py(y: float) -> float:
        return top + (y1 - min(max(y, y0), y1)) / (y1 - y0) * (height - top - bottom)

    parts = [_text(left - 44, 14, y_label, kind="axis")]
    for tick in ticks:
        y = py(tick)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text(left - 8, y + 4, _plain(tick), "end"))
    names = list(enumerate(x_names)) or [(t, _plain(t)) for t in _ticks(x0, x1) if x0 <= t <= x1]
    for x, name in names:
        parts.append(_text(px(x), height - bottom + 18, name, "middle"))
    parts.append(_text((left + width - right) / 2, height - 6, x_label, "middle", "axis"))
    ends = []
    for i, (name, points) in enumerate(series):
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="line s{i}" points="{path}"/>')
        if len(points) <= 40:
            for x, y in points:
                where = x_names[int(x)] if x_names else _plain(x)
                parts.append(
                    f'<circle class="dot s{i}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.5">'
                    f"<title>{escape(f'{name}, {where}: {_plain(y)}{unit}')}</title></circle>"
                )
        ends.append((py(points[-1][1]) + 4, name, i))
    for y, name, i in _spread(ends, 14, top):
        parts.append(
            f'<text class="name s{i}" x="{width - right + 8}" y="{y:.1f}">{escape(name)}</text>'
        )
    return _svg(width, height, title, parts)


def bars(
    title: str,
    groups: Sequence[tuple[str, Sequence[tuple[str, float, str]]]],
    *,
    limit: float,
    colours: Sequence[str],
    width: float = 560,
) -> str:
    """Horizontal bars in groups, each with its value beside it.

    Args:
        title: For readers who cannot see the chart.
        groups: Names, each with bars of (series, value, label).
        limit: The value of a full-width bar.
        colours: Names of the series, in the order of the page's colours.
        width: In pixels, at full size.
    """
    left, right, bar, gap, space = 160.0, 124.0, 12.0, 3.0, 12.0
    y, parts = 6.0, []
    for name, members in groups:
        size = len(members) * (bar + gap)
        parts.append(_text(left - 10, y + size / 2 + 3, name, "end", "group"))
        for series, value, label in members:
            length = max(1.0, min(value / limit, 1.0) * (width - left - right))
            colour = colours.index(series)
            parts.append(
                f'<rect class="track" x="{left}" y="{y}" width="{width - left - right}" height="{bar}" rx="2"/>'
                f'<rect class="bar s{colour}" x="{left}" y="{y}" width="{length:.1f}" height="{bar}" rx="2">'
                f"<title>{escape(f'{name}, {series}: {label}')}</title></rect>"
            )
            parts.append(_text(left + (width - left - right) + 8, y + bar - 2, label))
            y += bar + gap
        y += space
    return _svg(width, y, title, parts)


def ranges(
    title: str,
    groups: Sequence[tuple[str, Sequence[tuple[str, tuple[float, float, float]]]]],
    *,
    colours: Sequence[str],
    x_label: str,
    width: float = 560,
) -> str:
    """Ranges on a logarithmic axis: a bar from the least to the most, a mark at the middle.

    Args:
        title: For readers who cannot see the chart.
        groups: Names, each with (series, (least, middle, most)).
        colours: Names of the series, in the order of the page's colours.
        x_label: Under the axis.
        width: In pixels, at full size.
    """
    left, right, row, space = 160.0, 64.0, 15.0, 12.0
    numbers = [v for _, members in groups for _, triple in members for v in triple if v > 0]
    low = 10 ** math.floor(math.log10(min(numbers)))
    high = 10 ** math.ceil(math.log10(max(numbers) * 1.0001))
    height = sum(len(m) * row + space for _, m in groups) + 40

    def px(value: float) -> float:
        share = math.log(max(value, low) / low) / math.log(high / low)
        return left + share * (width - left - right)

    parts, tick = [], low
    while tick <= high * 1.001:
        x = px(tick)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 34:.1f}"/>'
        )
        parts.append(_text(x, height - 20, _plain(tick), "middle"))
        tick *= 10
    parts.append(_text((left + width - right) / 2, height - 4, x_label, "middle", "axis"))
    y = 6.0
    for name, members in groups:
        parts.append(_text(left - 10, y + len(members) * row / 2 + 2, name, "end", "group"))
        for series, (least, middle, most) in members:
            colour = colours.index(series)
            words = (
                f"{name}, {series}: {_plain(middle)} us, between {_plain(least)} and {_plain(most)}"
            )
            parts.append(
                f'<g><title>{escape(words)}</title><rect class="range s{colour}" x="{px(least):.1f}" '
                f'y="{y + 2:.1f}" width="{max(2, px(most) - px(least)):.1f}" height="8" rx="4"/>'
                f'<circle class="dot s{colour}" cx="{px(middle):.1f}" cy="{y + 6:.1f}" r="4.5"/></g>'
            )
            parts.append(_text(width - right + 8, y + 10, f"{_plain(middle)}"))
            y += row
        y += space
    return _svg(width, height, title, parts)


def legend(names: Sequence[str]) -> str:
    """The colours of the series."""
    items = "".join(f'<span><i class="s{i}"></i>{escape(n)}</span>' for i, n in enumerate(names))
    return f'<p class="legend">{items}</p>'
