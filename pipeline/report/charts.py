"""Charts as inline SVG. Colours and type are the page's, so that they follow its light or dark scheme."""

import math
from collections.abc import Mapping, Sequence
from html import escape

Point = tuple[float, float]
COLOURS = 8  # series colours that the page defines
DASHES = ("", "6 3", "1.5 2.5")  # of the first 8 series, the next 8, and so on
WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 26, 38


def line_chart(title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[Point]]) -> str:
    """A figure with a line a series, both axes from what the data span, y from 0; '' where no series has a point."""
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    every = [point for points in series.values() for point in points]
    x0, x1 = min(x for x, _ in every), max(x for x, _ in every)
    whole = all(float(x).is_integer() for x, _ in every)
    x_ticks, y_ticks = ticks(x0, x1, 1.0 if whole else 0.0), ticks(0.0, max(y for _, y in every))
    x1, y1 = max(x1, x0 + 1e-9), max(y_ticks[-1], max(y for _, y in every), 1e-9)

    def at(x: float, y: float) -> Point:
        return (
            LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - y / y1 * (HEIGHT - TOP - BOTTOM),
        )

    parts = [_text(WIDTH - RIGHT, HEIGHT - 4, x_label, "end"), _text(0, 11, y_label, "start")]
    for y in y_ticks:
        top = at(x0, y)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {top:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 6, top + 4, f"{y:g}", "end"))
    for x in (x for x in x_ticks if x0 <= x <= x1):
        parts.append(_text(at(x, 0)[0], HEIGHT - BOTTOM + 16, f"{x:g}", "middle"))
    for number, points in enumerate(series.values()):
        parts.append(_line(number, [at(*point) for point in points]))
    keys = {name: _line(number, [(0, 4), (22, 4)]) for number, name in enumerate(series)}
    return _figure(title, parts, WIDTH, HEIGHT, keys)


def dot_chart(title: str, x_label: str, rows: Mapping[str, Mapping[str, float]], series: Sequence[str]) -> str:
    """A figure with a row a name and a dot a series, from 0; '' where there is no number."""
    values = [value for row in rows.values() for value in row.values()]
    if not values:
        return ""
    left, pitch, width, top = 12 + 7 * max(map(len, rows)), 26, 760, 6
    steps = ticks(0.0, max(values))
    bottom, end = top + pitch * len(rows), max(steps[-1], max(values), 1e-9)

    def at(value: float) -> float:
        return left + value / end * (width - left - 40)

    parts = [_text(width - 2, bottom + 32, x_label, "end")]
    for value in steps:
        parts.append(f'<path class="grid" d="M{at(value):.1f} {top}V{bottom}"/>')
        parts.append(_text(at(value), bottom + 16, f"{value:g}", "middle"))
    for number, (name, row) in enumerate(rows.items()):
        y = top + pitch * number + pitch / 2
        parts.append(_text(left - 10, y + 4, name, "end"))
        if row:
            parts.append(
                f'<path class="grid strong" d="M{at(min(row.values())):.1f} {y}H{at(max(row.values())):.1f}"/>'
            )
        for colour, key in enumerate(series):
            if key in row:
                parts.append(
                    f'<circle class="s{colour}" cx="{at(row[key]):.1f}" cy="{y}" r="6">'
                    f"<title>{escape(name)}, {escape(key)}: {row[key]:.1f}</title></circle>"
                )
    keys = {name: f'<circle class="s{number}" cx="11" cy="4" r="4"/>' for number, name in enumerate(series)}
    return _figure(title, parts, width, bottom + 38, keys)


def ticks(low: float, high: float, least: float = 0.0, most: int = 6) -> list[float]:
    """About ``most`` round numbers, at least ``least`` apart, that reach from ``low`` or below to ``high`` or above."""
    span = high - low
    if not span > 0:
        return [low, low + 1]
    raw = max(least, span / (most - 1))
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def thin(points: Sequence[Point], most: int = 120) -> list[Point]:
    """At most ``most`` points, each the mean of its neighbours; what is not finite is left out."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = max(1, -(-len(finite) // most))
    groups = [finite[start : start + size] for start in range(0, len(finite), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _line(number: int, points: Sequence[Point]) -> str:
    pattern = DASHES[number // COLOURS % len(DASHES)]
    dash = f' stroke-dasharray="{pattern}"' if pattern else ""
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    if len(points) == 1:
        return f'<circle class="s{number % COLOURS}" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3"/>'
    return f'<polyline class="s{number % COLOURS}" points="{drawn}"{dash}/>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _figure(title: str, parts: Sequence[str], width: int, height: int, keys: Mapping[str, str]) -> str:
    legend = "".join(
        f'<li><svg viewBox="0 0 22 8" aria-hidden="true">{key}</svg>{escape(name)}</li>' for name, key in keys.items()
    )
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg><ul class="legend">{legend}</ul></figure>'
    )
