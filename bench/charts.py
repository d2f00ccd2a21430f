"""Charts as inline SVG: lines, bars and ranges. The page's style sheet gives their colours."""

import math
import textwrap
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple

from .table import human

Series = tuple[str, Sequence[tuple[float, float]]]
Box = tuple[float, float, float, float]  # left, top, right, bottom

_LETTER, _LINE = 7.2, 15.0  # pixels that a name takes at most for each letter and line


def element(name: str, content: str | None = None, **attributes: Any) -> str:
    """One element; ``content`` is markup. A trailing underscore leaves a keyword usable."""
    parts = [name]
    for key, value in attributes.items():
        text = f"{value:.1f}" if isinstance(value, float) else str(value)
        parts.append(f'{key.rstrip("_").replace("_", "-")}="{escape(text)}"')
    opening = " ".join(parts)
    return f"<{opening}/>" if content is None else f"<{opening}>{content}</{name}>"


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "tick") -> str:
    return element("text", escape(words), class_=kind, x=x, y=y, text_anchor=anchor)


def _hint(words: str) -> str:
    return element("title", escape(words))


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return element(
        "svg",
        _hint(title) + "".join(parts),
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        role="img",
        aria_label=title,
    )


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover low to high."""
    if high <= low:
        high = low + 1
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    return [k * step for k in range(first, math.ceil(high / step - 1e-9) + 1)]


def plain(value: float) -> str:
    """A number with three digits, as an axis or a label shows it."""
    if abs(value) >= 10000:
        return f"{value / 1000:g}k"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _apart(labels: Sequence[tuple[float, str, int]], gap: float) -> list[tuple[float, str, int]]:
    """Labels at (y, words, colour) moved down until none covers another."""
    placed: list[tuple[float, str, int]] = []
    for y, words, colour in sorted(labels):
        lowest = placed[-1][0] + gap if placed else y
        placed.append((max(y, lowest), words, colour))
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
        unit: After each number in the hints.
        width: In pixels, at full size.
        height: In pixels, at full size.
    """
    longest = max((len(name) for name, _ in series), default=0)
    left, right, top, bottom = 52.0, max(78.0, 12 + _LETTER * longest), 30.0, 42.0
    xs = [x for _, points in series for x, _ in points]
    ys = [y for _, points in series for _, y in points]
    y_ticks = _ticks(*(y_range or (min(ys), max(ys))))
    x0, x1 = min(xs), max(max(xs), min(xs) + 1e-9)
    y0, y1 = y_ticks[0], y_ticks[-1]
    inner_right, inner_bottom = width - right, height - bottom

    def px(x: float) -> float:
        return left + (x - x0) / (x1 - x0) * (inner_right - left)

    def py(y: float) -> float:
        return top + (y1 - min(max(y, y0), y1)) / (y1 - y0) * (inner_bottom - top)

    parts = [_text(left - 44, 14, y_label, kind="axis")]
    for tick in y_ticks:
        y = py(tick)
        parts.append(element("line", class_="grid", x1=left, x2=inner_right, y1=y, y2=y))
        parts.append(_text(left - 8, y + 4, plain(tick), "end"))
    names: list[tuple[float, str]] = [(float(i), name) for i, name in enumerate(x_names)]
    for x, name in names or [(t, plain(t)) for t in _ticks(x0, x1) if x0 <= t <= x1]:
        parts.append(_text(px(x), inner_bottom + 18, name, "middle"))
    parts.append(_text((left + inner_right) / 2, height - 6, x_label, "middle", "axis"))
    ends = []
    for i, (name, points) in enumerate(series):
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
        parts.append(element("polyline", class_=f"line s{i}", points=path))
        for x, y in points if len(points) <= 40 else ():
            where = x_names[int(x)] if x_names else plain(x)
            hint = _hint(f"{name}, {where}: {plain(y)}{unit}")
            parts.append(element("circle", hint, class_=f"dot s{i}", cx=px(x), cy=py(y), r=3.5))
        ends.append((py(points[-1][1]) + 4, name, i))
    for y, name, i in _apart(ends, 14):
        parts.append(_text(inner_right + 8, y, name, kind=f"name s{i}"))
    return _svg(width, height, title, parts)


def bars(
    title: str,
    groups: Sequence[tuple[str, Sequence[tuple[str, float, str]]]],
    *,
    limit: float,
    colours: Sequence[str],
    mark: float | None = None,
    width: float = 560,
) -> str:
    """Horizontal bars in groups, each with its value beside it.

    Args:
        title: For readers who cannot see the chart.
        groups: Names, each with bars of (series, value, label).
        limit: The value of a full-width bar.
        colours: Names of the series, in the order of the page's colours.
        mark: A value to mark with a line across all bars.
        width: In pixels, at full size.
    """
    left, right, thickness, gap, space = 160.0, 128.0, 12.0, 3.0, 12.0
    full = width - left - right
    y, parts = 6.0, []
    for name, members in groups:
        words = textwrap.wrap(name, int((left - 10) / _LETTER), break_long_words=False)
        high = len(members)
        size = max(high * (thickness + gap), len(words) * _LINE)
        for i, line in enumerate(words):
            middle = y + size / 2 + 3 + (i - (len(words) - 1) / 2) * _LINE
            parts.append(_text(left - 10, middle, line, "end", "group"))
        bottom, y = y + size, y + (size - high * (thickness + gap)) / 2
        for series, value, label in members:
            length = max(1.0, min(value / limit, 1.0) * full)
            place: dict[str, Any] = {"x": left, "y": y, "height": thickness, "rx": 2}
            parts.append(element("rect", class_="track", width=full, **place))
            hint = _hint(f"{name}, {series}: {label}")
            colour = f"bar s{colours.index(series)}"
            parts.append(element("rect", hint, class_=colour, width=length, **place))
            parts.append(_text(left + full + 8, y + thickness - 2, label))
            y += thickness + gap
        y = bottom + space
    if mark is not None:
        x = left + mark / limit * full
        parts.append(element("line", class_="mark", x1=x, x2=x, y1=0.0, y2=y - space))
    return _svg(width, y, title, parts)


def ranges(
    title: str,
    groups: Sequence[tuple[str, Sequence[tuple[str, Sequence[float]]]]],
    *,
    colours: Sequence[str],
    x_label: str,
    width: float = 560,
) -> str:
    """Ranges on a logarithmic axis: a band from the least to the most, a dot at the middle.

    Args:
        title: For readers who cannot see the chart.
        groups: Names, each with (series, (least, middle, most)).
        colours: Names of the series, in the order of the page's colours.
        x_label: Under the axis.
        width: In pixels, at full size.
    """
    left, right, row, space = 160.0, 64.0, 15.0, 12.0
    numbers = [v for _, members in groups for _, triple in members for v in triple if v > 0]
    low = 10.0 ** math.floor(math.log10(min(numbers)))
    high = 10.0 ** math.ceil(math.log10(max(numbers) * 1.0001))
    height = sum(len(members) * row + space for _, members in groups) + 40

    def px(value: float) -> float:
        share = math.log(max(value, low) / low) / math.log(high / low)
        return left + share * (width - left - right)

    parts, tick = [], low
    while tick <= high * 1.001:
        x = px(tick)
        parts.append(element("line", class_="grid", x1=x, x2=x, y1=0.0, y2=height - 34))
        parts.append(_text(x, height - 20, plain(tick), "middle"))
        tick *= 10
    parts.append(_text((left + width - right) / 2, height - 4, x_label, "middle", "axis"))
    y = 6.0
    for name, members in groups:
        parts.append(_text(left - 10, y + len(members) * row / 2 + 2, name, "end", "group"))
        for series, (least, middle, most) in members:
            colour = f"s{colours.index(series)}"
            low_x, band = px(least), max(2.0, px(most) - px(least))
            hint = _hint(
                f"{name}, {series}: {plain(middle)}, between {plain(least)} and {plain(most)}"
            )
            box: dict[str, Any] = {"x": low_x, "y": y + 2, "width": band, "height": 8, "rx": 4}
            parts.append(element("rect", hint, class_=f"range {colour}", **box))
            parts.append(
                element("circle", hint, class_=f"dot {colour}", cx=px(middle), cy=y + 6, r=4.5)
            )
            parts.append(_text(width - right + 8, y + 10, plain(middle)))
            y += row
        y += space
    return _svg(width, height, title, parts)


class Point(NamedTuple):
    """A call on a roofline chart.

    Attributes:
        name: Beside the dot, where there is room.
        intensity: FLOPs for each byte of global memory.
        speed: FLOPs a second.
        hint: Shown when pointed at, after the name.
        lost: Whether another contender is faster.
    """

    name: str
    intensity: float
    speed: float
    hint: str
    lost: bool = False


def roofline(
    title: str,
    bandwidth: float,
    peaks: Sequence[tuple[str, float]],
    points: Sequence[Point],
    *,
    colour: int,
    width: float = 560,
    height: float = 380,
) -> str:
    """Calls under the roofline of a part, both axes logarithmic; those lost to others are ringed.

    Args:
        title: For readers who cannot see the chart.
        bandwidth: Bytes a second.
        peaks: Names of the part's ceilings, each with its FLOPs a second.
        points: The calls; all above 0.
        colour: Of the roof and the dots, by its place among the page's colours.
        width: In pixels, at full size.
        height: In pixels, at full size.
    """
    left, right, top, bottom = 58.0, 16.0, 26.0, 42.0
    highest = max(peak for _, peak in peaks)
    x0, x1 = _decades([p.intensity / 1.3 for p in points] + [highest / bandwidth * 4])
    y0, y1 = _decades([p.speed / 1.3 for p in points] + [highest])

    def px(intensity: float) -> float:
        return left + math.log(intensity / x0) / math.log(x1 / x0) * (width - left - right)

    def py(speed: float) -> float:
        return top + math.log(y1 / speed) / math.log(y1 / y0) * (height - top - bottom)

    parts = [_text(4, 14, "FLOP/s", kind="axis")]
    for tick in _powers(x0, x1):
        x = px(tick)
        parts.append(element("line", class_="grid", x1=x, x2=x, y1=top, y2=height - bottom))
        parts.append(_text(x, height - bottom + 18, plain(tick), "middle"))
    for tick in _powers(y0, y1):
        y = py(tick)
        parts.append(element("line", class_="grid", x1=left, x2=width - right, y1=y, y2=y))
        parts.append(_text(left - 8, y + 4, human(tick).replace(" ", ""), "end"))
    middle = (left + width - right) / 2
    parts.append(_text(middle, height - 6, "FLOP a byte", "middle", "axis"))
    taken: list[Box] = []
    words = []  # over the lines, so that a line crossed by another roof's words gives way
    for name, peak in peaks:
        ridge = peak / bandwidth
        start = max(x0, y0 / bandwidth)
        corners = ((start, start * bandwidth), (ridge, peak), (x1, peak))
        places = [(px(x), py(y)) for x, y in corners]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(element("polyline", class_=f"line s{colour}", points=path))
        foot: dict[str, Any] = {"y1": py(peak), "y2": height - bottom}
        parts.append(element("line", class_="mark", x1=px(ridge), x2=px(ridge), **foot))
        said = f"{name} {human(peak)}FLOP/s, from {plain(ridge)} FLOP a byte"
        words.append(_text(width - right, py(peak) - 6, said, "end", "tick over"))
        taken.append(_box(width - right - _length(said), py(peak) - 6, said))
        taken += [box for a, b in pairwise(places) for box in _along(a, b)]
    dots = []
    for point in sorted(points, key=lambda p: -p.speed):
        x, y = px(point.intensity), py(point.speed)
        hint = _hint(f"{point.name}, {point.hint}")
        if point.lost:
            dots.append(element("circle", hint, class_="lost", cx=x, cy=y, r=8.0))
        dots.append(element("circle", hint, class_=f"dot s{colour}", cx=x, cy=y, r=4.5))
        taken.append((x - 6, y - 6, x + 6, y + 6))
    for point in sorted(points, key=lambda p: (not p.lost, -p.speed)):
        label = _beside(px(point.intensity), py(point.speed), point.name, taken, width - right)
        if label is not None:
            words.append(_text(*label, point.name, kind="tick over"))
    return _svg(width, height, title, [*parts, *words, *dots])


def _length(words: str) -> float:
    """Pixels that words take at the size of a tick's."""
    return 6.6 * len(words)


def _box(x: float, y: float, words: str) -> Box:
    """What words cover that start at x on the line y."""
    return (x, y - 10, x + _length(words), y + 3)


def _along(begin: tuple[float, float], end: tuple[float, float]) -> list[Box]:
    """Small boxes that cover a line."""
    (x0, y0), (x1, y1) = begin, end
    steps = max(1, math.ceil((x1 - x0) / 4))
    xs = [x0 + (x1 - x0) * i / steps for i in range(steps + 1)]
    ys = [y0 + (y1 - y0) * i / steps for i in range(steps + 1)]
    return [(xs[i], min(ys[i], ys[i + 1]), xs[i + 1], max(ys[i], ys[i + 1])) for i in range(steps)]


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Powers of ten around the values."""
    low = 10.0 ** math.floor(math.log10(min(values)) + 1e-9)
    high = 10.0 ** math.ceil(math.log10(max(values)) - 1e-9)
    return low, max(high, 10 * low)


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten from low to high."""
    return [low * 10.0**k for k in range(round(math.log10(high / low)) + 1)]


def _beside(
    x: float, y: float, words: str, taken: list[Box], edge: float
) -> tuple[float, float] | None:
    """Where words fit right or left of, above or below a dot; their place is then taken."""
    length = _length(words)
    right, left, middle = x + 9, x - 9 - length, x - length / 2
    level = [(right, y + 4), (left, y + 4)]
    lower = [(right, y + 15), (left, y + 15), (middle, y + 21)]
    upper = [(right, y - 8), (left, y - 8), (middle, y - 12)]
    places = level + lower + upper
    for at, base in places:
        box = _box(at, base, words)
        free = all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in taken)
        if free and at > 58 and box[2] < edge:
            taken.append(box)
            return at, base
    return None


def legend(names: Sequence[str]) -> str:
    """The colours of the series."""
    items = [
        element("span", element("i", "", class_=f"s{i}") + escape(name))
        for i, name in enumerate(names)
    ]
    return element("p", "".join(items), class_="legend")
