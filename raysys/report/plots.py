"""Charts as inline SVG, coloured by the page's style sheet, so that one file reads well in light and dark.

Drawn by hand rather than by a plotting library: text stays text, colours follow the reader's theme, and a chart of
three curves takes about 20 kB.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from raysys.report.format import compact, number
from raysys.report.markup import Markup, tag

Values = list[float | None]

THIN_FROM = 2000
"""Curves with at least this many points are thinned."""

_KEPT_POINTS = 600
_DOTTED_UP_TO = 60


@dataclass(frozen=True)
class Series:
    """A curve; `y` is None in a gap. `role` is the class of the style sheet that colours it: train, valid, test, c0 … c7."""

    name: str
    x: list[float]
    y: Values
    role: str
    dots: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Frame:
    """The plot area within an SVG, and the data range that it shows."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: int = 540
    height: int = 250
    left: int = 60
    right: int = 14
    top: int = 10
    bottom: int = 38

    def px(self, x: float) -> float:
        """Data to pixels from the left."""
        low, high = self.x_range
        return round(self.left + (x - low) / (high - low) * (self.width - self.left - self.right), 1)

    def py(self, y: float) -> float:
        """Data to pixels from the top."""
        low, high = self.y_range
        return round(self.height - self.bottom - (y - low) / (high - low) * (self.height - self.top - self.bottom), 1)


def thin(series: Series, keep: int = _KEPT_POINTS) -> Series:
    """A curve of at least `THIN_FROM` points with about `keep` of them: the lowest and highest of each stretch, so spikes stay."""
    if len(series.x) < THIN_FROM:
        return series
    stretches = keep // 2
    chosen = {0, len(series.x) - 1}
    for i in range(stretches):
        stretch = range(i * len(series.x) // stretches, (i + 1) * len(series.x) // stretches)
        known = [(series.y[j], j) for j in stretch if series.y[j] is not None]
        chosen |= {min(known)[1], max(known)[1]} if known else {stretch[0]}
    kept = sorted(chosen)
    return replace(series, x=[series.x[i] for i in kept], y=[series.y[i] for i in kept])


def smooth(series: Series, points: int) -> Series:
    """The mean over a window of about `points` neighbours, cut at both ends; gaps stay gaps."""
    totals, counts = [0.0], [0]
    for value in series.y:
        totals.append(totals[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    y: Values = []
    for i, value in enumerate(series.y):
        low, high = max(0, i - points // 2), min(len(series.y), i + points // 2 + 1)
        y.append(None if value is None else (totals[high] - totals[low]) / (counts[high] - counts[low]))
    return replace(series, y=y)


def line_chart(
    series: list[Series],
    x_label: str,
    y_label: str,
    *,
    y_from: float | None = None,
    level: float | None = None,
    marks: list[tuple[float, str]] | None = None,
    categories: list[str] | None = None,
) -> Markup:
    """Curves over steps. `level` is a dashed horizontal line, `marks` are labelled vertical ones (x, label).

    categories: names for x = 0, 1, … in place of numbers.
    """
    series = [thin(one) for one in series]
    xs = [x for one in series for x in one.x]
    first = 0.0 if 0 < min(xs) < 0.25 * max(xs) else min(xs)
    x_range = _widened(first, max(xs), 0.0) if categories is None else (-0.3, len(categories) - 0.7)
    frame = Frame(x_range, _y_range(series, y_from, level))
    shapes = [_axes(frame, x_label, y_label, categories)]
    shapes += [_mark(frame, x, label) for x, label in marks or []]
    if level is not None:
        y = frame.py(level)
        shapes.append(tag("path", class_="level", d=f"M{frame.left},{y}H{frame.width - frame.right}"))
    shapes.append(_clipped(frame, [_curve(frame, one) for one in series]))
    return _svg(frame, y_label, shapes)


def calibration_chart(curves: dict[str, list[dict[str, float]]]) -> Markup:
    """Observed rate over mean prediction by split, each bin with the 95% interval of a binomial of the bin's weight."""
    points = [point for curve in curves.values() for point in curve]
    top = max([max(point["prediction"], point["label"]) for point in points]) or 1.0
    frame = Frame((0.0, top * 1.05), (0.0, top * 1.05), width=360, height=340)
    ends = (frame.px(0), frame.py(0), frame.px(top * 1.05), frame.py(top * 1.05))
    diagonal = tag("path", class_="level", d="M{},{}L{},{}".format(*ends))
    shapes = [_axes(frame, "mean prediction", "observed rate"), diagonal]
    for split, curve in curves.items():
        ordered = sorted(curve, key=lambda point: point["prediction"])
        shapes.append(tag("g", *(_whisker(frame, point) for point in ordered), class_=split))
        x, y = [point["prediction"] for point in ordered], [point["label"] for point in ordered]
        shapes.append(_curve(frame, Series(split, x, list(y), split, dots=True)))
    return _svg(frame, "calibration", shapes)


def stacked_bar(parts: dict[str, float], text: Callable[[float], str]) -> Markup:
    """One horizontal bar cut into named parts; a part shows its share where there is room, and its value on hover."""
    total = sum(parts.values())
    pieces = []
    for i, (name, value) in enumerate(parts.items()):
        portion = value / total
        label = tag("b", f"{portion:.0%}") if portion >= 0.08 else None
        hover = f"{name}: {text(value)} ({portion:.1%})"
        pieces.append(tag("span", label, class_=f"c{i % 8}", style=f"flex-grow:{portion:.4f}", title=hover))
    return tag("div", *pieces, class_="bar")


def meter(value: float) -> Markup:
    """A share in [0, 1] as a small bar for a table cell."""
    filled = round(min(max(value, 0.0), 1.0) * 60, 1)
    bars = (
        tag("rect", width=60, height=6, rx=3, class_="empty"),
        tag("rect", width=filled, height=6, rx=3, class_="full"),
    )
    return tag("svg", *bars, viewBox="0 0 60 6", class_="meter", aria_hidden="true")


def deviation(value: float, scale: float, good: bool) -> Markup:
    """A signed difference as a bar to the left or right of a middle line, full at ±`scale`."""
    length = round(min(abs(value) / scale, 1.0) * 30, 1) if scale else 0.0
    bar = tag(
        "rect", x=30 if value > 0 else round(30 - length, 1), width=length, height=8, class_="good" if good else "bad"
    )
    middle = tag("path", d="M30,0V8", class_="middle")
    return tag("svg", bar, middle, viewBox="0 0 60 8", class_="deviation", aria_hidden="true")


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high], 1, 2, 2.5 or 5 times a power of ten apart."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _svg(frame: Frame, label: str, shapes: list[Markup]) -> Markup:
    return tag(
        "svg", *shapes, viewBox=f"0 0 {frame.width} {frame.height}", role="img", aria_label=label, class_="chart"
    )


def _clipped(frame: Frame, shapes: list[Markup]) -> Markup:
    """An SVG within the SVG, in the same coordinates, that cuts off what lies outside of the plot area (but no dot on its edge)."""
    x, y = frame.left - 4, frame.top - 4
    width, height = frame.width - frame.right + 4 - x, frame.height - frame.bottom + 4 - y
    return tag("svg", *shapes, x=x, y=y, width=width, height=height, viewBox=f"{x} {y} {width} {height}")


def _axes(frame: Frame, x_label: str, y_label: str, categories: list[str] | None = None) -> Markup:
    left, right, base = frame.left, frame.width - frame.right, frame.height - frame.bottom
    y_ticks = ticks(*frame.y_range)
    text = _tick_text(y_ticks)
    shapes = []
    for value in y_ticks:
        y = frame.py(value)
        shapes.append(tag("path", class_="grid-line", d=f"M{left},{y}H{right}"))
        shapes.append(tag("text", text(value), x=left - 7, y=y + 3.5, class_="end"))
    x_ticks = ticks(*frame.x_range, about=6)
    text = _tick_text(x_ticks)
    x_texts = dict(enumerate(categories)) if categories else {x: text(x) for x in x_ticks}
    shapes += [tag("text", name, x=frame.px(x), y=base + 16, class_="mid") for x, name in x_texts.items()]
    shapes.append(tag("path", class_="axis", d=f"M{left},{base}H{right}"))
    shapes.append(tag("text", x_label, x=(left + right) / 2, y=frame.height - 5, class_="mid label"))
    middle = round((frame.top + base) / 2, 1)
    shapes.append(tag("text", y_label, class_="mid label", transform=f"translate(10 {middle}) rotate(-90)"))
    return tag("g", *shapes)


def _tick_text(values: list[float]) -> Callable[[float], str]:
    """Labels of one unit and one number of decimals, as many as the step between the ticks needs."""
    step = values[1] - values[0] if len(values) > 1 else abs(values[0]) if values else 1.0
    largest = max((abs(value) for value in values), default=0.0)
    if largest < 1e-3:
        return lambda value: f"{value:.1e}" if value else "0"
    power = next((power for power in (12, 9, 6, 3) if largest >= 10**power and largest >= 5000), 0)
    unit, scale = {12: "T", 9: "G", 6: "M", 3: "k", 0: ""}[power], 10.0**power
    decimals = next((d for d in range(6) if abs(round(step / scale, d) - step / scale) < 1e-6 * step / scale), 6)
    return lambda value: f"{value / scale:.{decimals}f}{unit}" if value or not unit else "0"


def _curve(frame: Frame, series: Series) -> Markup:
    pieces: list[list[tuple[float, float]]] = [[]]
    dots, dotted = [], series.dots and len(series.x) <= _DOTTED_UP_TO
    for x, y in zip(series.x, series.y, strict=True):
        if y is None:
            pieces.append([])
            continue
        at = (frame.px(x), frame.py(y))
        pieces[-1].append(at)
        if dotted and frame.y_range[0] <= y <= frame.y_range[1]:
            title = tag("title", f"{series.name} {number(y)} at {compact(x)}")
            dots.append(tag("circle", title, cx=at[0], cy=at[1], r=2.8))
    path = "".join("M" + " ".join(f"{x:g},{y:g}" for x, y in piece) for piece in pieces if len(piece) > 1)
    line = tag("path", d=path, class_="line faint" if series.faint else "line")
    lone = [tag("circle", cx=piece[0][0], cy=piece[0][1], r=2) for piece in pieces if len(piece) == 1]
    return tag("g", line, *(dots or lone), class_=series.role)


def _mark(frame: Frame, x: float, label: str) -> Markup:
    at, base = frame.px(x), frame.height - frame.bottom
    line = tag("path", class_="mark", d=f"M{at},{frame.top}V{base}")
    near_end = at > frame.width * 0.75
    return tag(
        "g",
        line,
        tag(
            "text", label, x=at - 4 if near_end else at + 4, y=frame.top + 9, class_="note end" if near_end else "note"
        ),
    )


def _whisker(frame: Frame, point: dict[str, float]) -> Markup:
    rate, weight = point["label"], point["weight"]
    reach = 1.96 * math.sqrt(max(rate * (1 - rate), 0.0) / weight) if weight > 0 else 0.0
    low, high = max(rate - reach, frame.y_range[0]), min(rate + reach, frame.y_range[1])
    return tag("path", class_="whisker", d=f"M{frame.px(point['prediction'])},{frame.py(low)}V{frame.py(high)}")


def _y_range(series: list[Series], y_from: float | None, level: float | None) -> tuple[float, float]:
    """The range of what matters: the first steps of a long curve, often far off, do not stretch the axis."""
    values = [] if level is None else [level]
    for one in series:
        skip = len(one.y) // 20 if len(one.y) >= 40 and y_from is None else 0
        values += [y for y in one.y[skip:] if y is not None]
    low, high = _widened(min(values), max(values), 0.05)
    return (y_from, max(high, y_from + 1e-9)) if y_from is not None else (low, high)


def _widened(low: float, high: float, margin: float) -> tuple[float, float]:
    if high - low < 1e-12 + 1e-9 * abs(high):
        margin, low, high = 0.0, low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    return low - margin * (high - low), high + margin * (high - low)
