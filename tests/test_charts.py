"""The report's charts: their geometry, and the SVG that the templates draw of it."""

import re
from typing import Any

import pytest

from pipeline.report import charts
from pipeline.report.page import ENVIRONMENT, TEMPLATES


def test_chart_axes_are_round_and_long_curves_are_thinned() -> None:
    assert charts.ticks(0, 0.59) == [0, 0.2, 0.4, 0.6]
    assert charts.ticks(1, 12) == [0, 5, 10, 15]
    assert charts.ticks(3, 3) == [3, 4]
    points = charts.thin([(step, float(step)) for step in range(1000)] + [(1000, float("nan"))], 100)
    assert len(points) == 100
    assert points[0] == (4.5, 4.5)
    assert charts.line_chart("none", "x", "y", {"a": []}) is None


def drawn(count: int) -> str:
    """The chart of ``count`` lines that start at 0 and end at 0, 1, 2 ..."""
    chart = charts.line_chart("many", "x", "y", {f"n{number}": [(0, 0), (1, number)] for number in range(count)})
    assert chart is not None
    template: Any = ENVIRONMENT.get_template("charts.html.j2").module
    return str(template.panels(chart, "all") if chart.panels else template.overlay(chart))


def test_few_lines_share_a_frame_in_colours_of_their_own() -> None:
    page = drawn(8)
    assert page.count('<svg class="chart"') == 1
    lines = re.findall(r'<g class="(s\d)"><title>(n\d)</title><polyline', page)
    assert lines == [(f"s{number}", f"n{number}") for number in range(8)]
    keys = re.findall(r'<circle class="(s\d)"[^>]*/></svg>(n\d) <b>(\d)</b>', page)
    assert keys == [(f"s{number}", f"n{number}", str(number)) for number in range(8)]
    style = (TEMPLATES / "style.css").read_text()
    colours = [re.findall(rf"--s{number}: (#\w+);", style) for number in range(charts.COLOURS)]
    light, dark = zip(*colours, strict=True)
    assert len(set(light)) == len(set(dark)) == 8


def test_each_of_many_lines_has_a_panel_with_the_others_behind_it() -> None:
    page = drawn(22)
    muted = re.findall(r'points="([^"]*)"', page.partition('<div class="panels">')[0])
    assert len(muted) == len(set(muted)) == 22
    panels = re.findall(r"<div><span>(.*?)</span> <b>(\d+)</b>(.*?)</svg>", page, re.DOTALL)
    assert [(name, value) for name, value, _ in panels] == [(f"n{number}", str(number)) for number in range(22)]
    assert all('<use href="#all"/>' in panel for _, _, panel in panels)
    assert [re.findall(r'<polyline points="([^"]*)"', panel) for _, _, panel in panels] == [[line] for line in muted]


@pytest.mark.parametrize(("highest", "value"), [(False, "2"), (True, "7 at 1")])
def test_a_line_is_labelled_with_its_last_or_highest_value(highest: bool, value: str) -> None:
    chart = charts.line_chart("peak", "x", "y", {"a": [(0, 1), (1, 7), (2, 2)]}, highest)
    assert chart is not None
    (line,) = chart.lines
    assert line.value == value
    assert line.mark == line.points[1 if highest else 2]


def test_dots_lie_on_a_common_axis_beside_their_names() -> None:
    rows = {"a": {"x": 20.0, "y": 50.0}, "b": {"y": 12.5}, "c": {}}
    chart = charts.dot_chart("steps", "mIoU (%)", rows, ["x", "y"])
    assert chart is not None
    assert [label for _, label in chart.x_ticks] == ["0", "10", "20", "30", "40", "50"]
    assert [row.dots for row in chart.rows] == [[(0, 40.0, "20.0"), (1, 100.0, "50.0")], [(1, 25.0, "12.5")], []]
    template: Any = ENVIRONMENT.get_template("charts.html.j2").module
    page = str(template.dots(chart))
    body = page.partition("<tbody>")[2]
    assert re.findall(r'<th scope="row">(\w)</th>', body) == ["a", "b", "c"]
    assert re.findall(r'<i class="(s\d)" style="left:([\d.]+)%" title="(\w: [\d.]+)"', body) == [
        ("s0", "40.00", "x: 20.0"),
        ("s1", "100.00", "y: 50.0"),
        ("s1", "25.00", "y: 12.5"),
    ]
    assert re.findall(r"<td>([\d.–]+)</td>", body) == ["50.0", "12.5", "–"]  # of the last step
    assert "<s " not in page
    assert "over the seeds" not in page


def test_a_bar_extends_from_the_least_to_the_greatest_value_of_the_seeds() -> None:
    ranges = {"a": {"y": (10.0, 100.0)}}
    chart = charts.dot_chart("steps", "mIoU (%)", {"a": {"x": 20.0, "y": 50.0}, "b": {"y": 40.0}}, ["x", "y"], ranges)
    assert chart is not None
    assert chart.x_ticks[-1] == (100.0, "100")  # the bar fits, not only the dots
    assert [row.bars for row in chart.rows] == [[(1, 10.0, 90.0)], []]
    template: Any = ENVIRONMENT.get_template("charts.html.j2").module
    page = str(template.dots(chart))
    assert re.findall(r'<s class="(s\d)" style="left:([\d.]+)%;width:([\d.]+)%"', page) == [("s1", "10.00", "90.00")]
    assert "a bar extends over the seeds" in page
