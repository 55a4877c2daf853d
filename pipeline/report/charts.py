"""Geometry of the report's charts, which templates/charts.html.j2 draws in the page's colours.

Lines are inline SVG. Dots lie in the cells of a table, so that their texts do not shrink with the window.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Point = tuple[float, float]
Tick = tuple[float, str]  # position in the SVG's units, label
COLOURS = 8  # number of series colours in style.css; more series are drawn as small multiples


@dataclass(frozen=True)
class Frame:
    """Size and margins of a chart in SVG units, and the approximate number of ticks per axis."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    ticks: int


OVERLAY = Frame(width=400, height=200, left=40, right=14, top=8, bottom=24, ticks=5)
PANEL = Frame(width=200, height=112, left=34, right=10, top=8, bottom=20, ticks=4)


@dataclass(frozen=True)
class Line:
    """One series. ``value`` is its last y as text, or its highest with its x; ``mark`` is that point's SVG position."""

    name: str
    points: Sequence[Point]  # SVG units
    value: str
    mark: Point


@dataclass(frozen=True)
class LineChart:
    """Lines over common axes. ``panels``: draw a small chart for each line, with the other lines in grey."""

    title: str
    x_label: str
    y_label: str
    value_label: str  # meaning of Line.value
    frame: Frame
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    lines: Sequence[Line]

    @property
    def panels(self) -> bool:
        return self.frame is PANEL


@dataclass(frozen=True)
class DotRow:
    """One row of a dot chart.

    ``dots`` holds (series number, percent of the axis, value as text), ``bars`` (series number, start and width in
    percent of the axis).
    """

    name: str
    dots: Sequence[tuple[int, float, str]]
    bars: Sequence[tuple[int, float, float]] = ()


@dataclass(frozen=True)
class DotChart:
    """A chart with a row for each method and a dot for each series. Positions are in percent of the axis."""

    title: str
    x_label: str
    x_ticks: Sequence[Tick]
    series: Sequence[str]
    rows: Sequence[DotRow]

    @property
    def has_bars(self) -> bool:
        return any(row.bars for row in self.rows)


def line_chart(
    title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[Point]], highest: bool = False
) -> LineChart | None:
    """Lay out a chart with a line for each series; x spans the data, y starts at 0. None if no series has points.

    Up to ``COLOURS`` series share one frame; more are drawn as small multiples. ``highest`` labels each line with its
    highest y instead of its last.
    """
    series = {name: points for name, points in series.items() if points}
    if not series:
        return None
    frame = OVERLAY if len(series) <= COLOURS else PANEL
    every = [point for points in series.values() for point in points]
    x0, x1 = min(x for x, _ in every), max(x for x, _ in every)
    top = max(y for _, y in every)
    whole = all(float(x).is_integer() for x, _ in every)
    x_ticks = ticks(x0, x1, 1.0 if whole else 0.0, frame.ticks)
    y_ticks = ticks(0.0, top, most=frame.ticks)
    x_span, y_span = max(x1 - x0, 1e-9), max(y_ticks[-1], top, 1e-9)

    def at(x: float, y: float) -> Point:
        return (
            frame.left + (x - x0) / x_span * (frame.width - frame.left - frame.right),
            frame.height - frame.bottom - y / y_span * (frame.height - frame.top - frame.bottom),
        )

    def line(name: str, points: Sequence[Point]) -> Line:
        x, y = max(points, key=lambda point: point[1]) if highest else points[-1]
        value = f"{y:.3g} at {x:.3g}" if highest else f"{y:.3g}"
        return Line(name, [at(*point) for point in points], value, at(x, y))

    return LineChart(
        title,
        x_label,
        y_label,
        f"highest value of each line and its {x_label}" if highest else "last value of each line",
        frame,
        [(at(x, 0)[0], f"{x:g}") for x in x_ticks if x0 <= x <= x1],
        [(at(x0, y)[1], f"{y:g}") for y in y_ticks],
        [line(name, points) for name, points in series.items()],
    )


def dot_chart(
    title: str,
    x_label: str,
    rows: Mapping[str, Mapping[str, float]],
    series: Sequence[str],
    ranges: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> DotChart | None:
    """Lay out a chart with a row for each name and a dot for each of ``series``; x starts at 0. None without values.

    ``ranges`` holds the least and the greatest value of dots, by row and series. A bar extends over each.
    """
    values = [value for row in rows.values() for value in row.values()]
    if not values:
        return None
    ranges = ranges or {}
    values += [most for row in ranges.values() for _, most in row.values()]
    steps = ticks(0.0, max(values))
    end = max(steps[-1], max(values), 1e-9)
    drawn = [
        DotRow(
            name,
            [(index, 100 * row[key] / end, f"{row[key]:.1f}") for index, key in enumerate(series) if key in row],
            [
                (series.index(key), 100 * least / end, 100 * (most - least) / end)
                for key, (least, most) in ranges.get(name, {}).items()
            ],
        )
        for name, row in rows.items()
    ]
    return DotChart(title, x_label, [(100 * value / end, f"{value:g}") for value in steps], series, drawn)


def ticks(low: float, high: float, least: float = 0.0, most: int = 6) -> list[float]:
    """About ``most`` evenly spaced round numbers that enclose [``low``, ``high``], at least ``least`` apart."""
    span = high - low
    if not span > 0:
        return [low, low + 1]
    raw = max(least, span / (most - 1))
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def thin(points: Sequence[Point], most: int = 120) -> list[Point]:
    """Reduce points to at most ``most`` by averaging consecutive ones; points that are not finite are dropped."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = max(1, -(-len(finite) // most))
    groups = [finite[start : start + size] for start in range(0, len(finite), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
