"""Charts: places, rings, and labels that fit and do not cover one another."""

import re
from itertools import pairwise

import pytest

from fastlm.bench.charts import Point, bars, lines, roofline


def places(svg, kind):
    found = re.findall(rf'<circle class="{kind}[^"]*" cx="([\d.]+)" cy="([\d.]+)"', svg)
    return [tuple(map(float, place)) for place in found]


def test_points_lie_under_the_roof_where_they_should():
    """A part of 1 TB/s and 100 TFLOP/s: the ridge is at 100 FLOP a byte."""
    points = [
        Point("bound by memory", 10.0, 10e12, "10 TFLOP/s"),
        Point("bound by products", 1000.0, 100e12, "100 TFLOP/s"),
        Point("half of that", 1000.0, 50e12, "50 TFLOP/s", lost=True),
    ]
    svg = roofline("r", 1e12, [("half", 100e12)], points, colour=2)
    corners = [
        tuple(map(float, c.split(","))) for c in re.search(r'points="([^"]+)"', svg)[1].split()
    ]
    (x0, y0), ridge, end = corners
    assert ridge[1] == end[1] < y0
    by_memory, *_ = [place for place in places(svg, "dot") if place[0] < ridge[0]]
    slope = (y0 - ridge[1]) / (ridge[0] - x0)
    assert y0 - slope * (by_memory[0] - x0) == pytest.approx(by_memory[1], abs=0.3)
    right = sorted(y for x, y in places(svg, "dot") if x > ridge[0])
    assert right[0] == pytest.approx(ridge[1], abs=0.1)  # on the roof
    assert places(svg, "lost") == [(places(svg, "dot")[1][0], right[1])]  # the slower is ringed
    assert "half 100 TFLOP/s, from 100 FLOP a byte" in svg
    assert "<title>half of that, 50 TFLOP/s</title>" in svg


def test_labels_keep_apart_and_losses_come_first():
    crowd = [Point(f"op number {i}", 1.0 + i / 1000, 1e12, "", lost=i == 39) for i in range(40)]
    svg = roofline("r", 2e12, [("half", 100e12)], crowd, colour=0)
    labels = re.findall(r'x="([\d.]+)" y="([\d.]+)" text-anchor="start">(op number \d+)<', svg)
    assert 1 <= len(labels) < 40
    assert "op number 39" in {name for *_, name in labels}
    boxes = [(float(x), float(y), float(x) + 6.6 * len(name)) for x, y, name in labels]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] < b[0] or b[2] < a[0] or abs(a[1] - b[1]) >= 11
    assert svg.count("<title>op number") == 41  # a hint each, and the ring's


def test_labels_leave_the_roof_and_its_words_free():
    crowd = [Point(f"op number {i}", 30.0 + 8 * i, 20e12 + 3e12 * i, "") for i in range(30)]
    svg = roofline("r", 1e12, [("half", 100e12), ("quarter", 200e12)], crowd, colour=0)
    roofs = [
        [tuple(map(float, c.split(","))) for c in points.split()]
        for points in re.findall(r'points="([^"]+)"', svg)
    ]
    said = re.findall(r'x="([\d.]+)" y="([\d.]+)" text-anchor="end">((?:half|quarter)[^<]+)<', svg)
    assert len(said) == len(roofs) == 2
    words = [(float(x) - 6.6 * len(text), float(x), float(y)) for x, y, text in said]
    labels = re.findall(r'x="([\d.]+)" y="([\d.]+)" text-anchor="start">(op number \d+)<', svg)
    assert len(labels) >= 6
    for x, y, name in labels:
        left, right, base = float(x), float(x) + 6.6 * len(name), float(y)
        for begin, end, line in words:
            assert right < begin or end < left or abs(base - line) >= 11
        for (x0, y0), (ridge, peak), _ in roofs:
            for at in (left, (left + right) / 2, right):
                roof = peak if at >= ridge else y0 + (peak - y0) * (at - x0) / (ridge - x0)
                assert not base - 9 < roof < base + 2, (name, at, roof)


def texts(svg, kind):
    found = re.findall(rf'<text class="{kind}[^"]*" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)<', svg)
    return [(float(x), float(y), words) for x, y, words in found]


def test_long_names_of_groups_take_lines_of_their_own():
    name = "tiny block_size=512 float32 B=1 T=1 and 500 new, temperature=0.8 top_k=200"
    members = [("fused", 2.0, "2x"), ("eager", 1.0, "1x")]
    svg = bars("b", [(name, members), ("short", members)], limit=2.0, colours=("fused", "eager"))
    said = texts(svg, "group")
    assert " ".join(words for *_, words in said) == f"{name} short"
    assert all(x - 7 * len(words) >= 0 for x, _, words in said)
    heights = [y for _, y, _ in said]
    assert all(b - a >= 13 for a, b in pairwise(heights))
    tops = [float(y) for y in re.findall(r'<rect class="bar[^"]*"[^>]* y="([\d.]+)"', svg)]
    assert len(tops) == 4
    assert heights[0] < tops[0] < tops[1] < heights[-2]  # beside the middle of its name
    assert tops[2] - 12 < heights[-1] < tops[3] + 24


def test_names_at_the_ends_of_lines_fit():
    series = [("transformers", [(0.0, 1.0), (1.0, 2.0)]), ("a", [(0.0, 2.0), (1.0, 1.0)])]
    svg = lines("l", series, x_label="x", y_label="y", width=560)
    assert all(x + 7 * len(words) <= 560 for x, _, words in texts(svg, "name"))
