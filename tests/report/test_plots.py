from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from raysys.report.markup import Markup, join, table, tag
from raysys.report.plots import (
    Series,
    calibration_chart,
    deviation,
    line_chart,
    meter,
    smooth,
    stacked_bar,
    thin,
    ticks,
)


def series(n: int, **options) -> Series:
    return Series("train", [float(i) for i in range(n)], [float(np.sin(i / 50)) for i in range(n)], "train", **options)


def test_everything_but_markup_is_escaped():
    hostile = "<script>alert('&')</script>"
    assert "<script" not in tag("p", hostile, title='"' + hostile)
    assert tag("b", tag("i", "x")) == "<b><i>x</i></b>"
    assert (
        tag("rect", stroke_width=2, class_="a", viewBox="0 0 1 1", x=None)
        == '<rect stroke-width="2" class="a" viewBox="0 0 1 1"></rect>'
    )
    assert isinstance(join(["<", None]), Markup)
    assert join(["<", None]) == "&lt;"
    assert "&lt;b&gt;" in table(["<b>"], [["<b>"]])


def test_long_curves_are_thinned_and_keep_their_spikes():
    long = series(50_000)
    long.y[31_234], long.y[42_000] = 77.0, None
    thinned = thin(long)
    assert len(thinned.x) < 700
    assert 77.0 in thinned.y
    assert (thinned.x[0], thinned.x[-1]) == (0.0, 49_999.0)
    assert thinned.x == sorted(thinned.x)
    assert thin(series(1999)).x == series(1999).x
    assert len(thin(Series("gaps", [float(i) for i in range(3000)], [None] * 3000, "train")).x) > 0


def test_smoothing_keeps_level_and_gaps():
    flat = Series("a", [0.0, 1.0, 2.0, 3.0], [2.0, None, 2.0, 2.0], "train")
    assert smooth(flat, 3).y == [2.0, None, 2.0, 2.0]
    assert smooth(Series("a", [0.0, 1.0, 2.0], [0.0, 3.0, 6.0], "train"), 3).y == [1.5, 3.0, 4.5]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 600, [0, 100, 200, 300, 400, 500, 600]),
        (0.78, 0.8, [0.78, 0.785, 0.79, 0.795, 0.8]),
    ],
)
def test_ticks_are_round(low, high, expected):
    about = 6 if high == 600 else 5
    assert ticks(low, high, about) == pytest.approx(expected)


@pytest.mark.parametrize(
    "curves",
    [
        [series(300)],
        [series(5000), Series("test", [4999.0], [0.1], "test", dots=True)],
        [Series("one", [10.0], [0.5], "valid", dots=True)],
        [Series("flat", [0.0, 1.0], [0.0, 0.0], "train")],
        [Series("gap", [0.0, 1.0, 2.0, 3.0], [1.0, None, 2.0, 3.0], "train")],
        [Series("tiny", [0.0, 1.0], [1e-7, 2e-7], "train")],
        [Series("huge", [0.0, 1e9], [1e12, 5e12], "train")],
    ],
)
def test_a_chart_is_well_formed_and_small(curves):
    chart = line_chart(curves, "step", "loss", level=0.5, marks=[(curves[0].x[0], "<best>")])
    root = ET.fromstring(chart)
    texts = [element.text for element in root.iter("text")]
    assert "step" in texts
    assert "loss" in texts
    assert "<best>" in texts
    assert "nan" not in chart
    assert len(chart) < 40_000


def test_ticks_of_one_axis_have_one_unit():
    chart = line_chart(
        [Series("rows/s", [0.0, 600.0], [10_200.0, 9_900.0], "train")], "step", "rows per second", y_from=0.0
    )
    texts = [element.text for element in ET.fromstring(chart).iter("text")]
    assert texts[:5] == ["0", "2.5k", "5.0k", "7.5k", "10.0k"]


def test_a_curve_breaks_at_a_gap_and_a_lone_point_is_a_dot():
    chart = line_chart([Series("gap", [0.0, 1.0, 2.0, 3.0, 4.0], [1.0, 2.0, None, 2.0, None], "train")], "step", "loss")
    (line,) = [element for element in ET.fromstring(chart).iter("path") if element.get("class") == "line"]
    assert line.get("d").count("M") == 1
    assert len(list(ET.fromstring(chart).iter("circle"))) == 1


def test_calibration_points_lie_where_they_should():
    curve = [{"prediction": 0.5, "label": 0.25, "weight": 100.0}, {"prediction": 1.0, "label": 1.0, "weight": 0.0}]
    root = ET.fromstring(calibration_chart({"test": curve}))
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in root.iter("circle")]
    diagonal = next(path.get("d") for path in root.iter("path") if path.get("class") == "level")
    (left, bottom), (right, top) = [tuple(map(float, end.split(","))) for end in diagonal[1:].split("L")]
    assert dots[0][0] == pytest.approx(left + (right - left) * 0.5 / 1.05, abs=0.1)
    assert dots[0][1] == pytest.approx(bottom + (top - bottom) * 0.25 / 1.05, abs=0.1)
    assert "nan" not in calibration_chart({"test": [{"prediction": 0.0, "label": 0.0, "weight": 1.0}]})


def test_small_bars():
    bar = stacked_bar({"read": 0.25, "<b>": 0.75}, lambda value: f"{value}s")
    assert 'title="read: 0.25s (25.0%)"' in bar
    assert "<b>: " not in bar
    assert 'width="15.0"' in meter(0.25)
    assert 'width="60.0"' in meter(7.0)
    assert 'class="good"' in deviation(-0.1, 0.2, good=True)
    assert 'width="0.0"' in deviation(0.0, 0.0, good=False)
