"""The report's templates: they escape every name, refuse misspelt variables and are installed with the package."""

import copy
import dataclasses
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError

from pipeline.report import charts, tables
from pipeline.report.page import ENVIRONMENT, TEMPLATES
from pipeline.report.sections import Results, document
from stages import report
from tests import test_report as drawn

MARK = "_x1x"  # ends every name that a user chooses
HOSTILE = """"'><script>&lt;{{ 7 }}"""
NAMES = ["circle", "square", "cross"]


class Outline(HTMLParser):
    """Tags with the names of their attributes; texts by the last tag before them; values by attribute."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.texts: dict[str, list[str]] = {}
        self.values: dict[str, list[str]] = {}
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))
        for name, value in attrs:
            self.values.setdefault(name, []).append(value or "")

    def handle_data(self, data: str) -> None:
        if self.tags:
            self.texts.setdefault(self.tags[-1][0], []).append(data)


def marked() -> dict[str, Any]:
    """test_report's experiment; its name and those of its dataset, rows and classifiers end with MARK."""
    raw = copy.deepcopy(drawn.RAW)
    raw["classifiers"]["drs"] = {**drawn.SMALL, "suppression": {}}
    raw |= {"experiment": raw["experiment"] + MARK, "method": raw["method"] + MARK}
    raw["dataset"]["root"] += MARK
    for section in ("segmentations", "classifiers"):
        raw[section] = {name + MARK: block for name, block in raw[section].items()}
    for section, key in (("refinements", "source"), ("localizations", "model"), ("pseudo_labels", "source")):
        for block in raw[section].values():
            if block[key].startswith("classifiers/"):
                block[key] += MARK
    return raw


def hostile(value: Any) -> Any:
    """``value`` with HOSTILE instead of MARK in every string that it holds."""
    match value:
        case str():
            return value.replace(MARK, HOSTILE)
        case dict():
            return {hostile(key): hostile(entry) for key, entry in value.items()}
        case list() | tuple():
            return type(value)(map(hostile, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{field.name: hostile(getattr(value, field.name)) for field in dataclasses.fields(value)}
        )
    return value


def test_names_are_escaped_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Params refuse such names of blocks, class names and experiments may hold anything; the page trusts neither."""
    caught: list[Results] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drawn, "NAMES", [name + MARK for name in NAMES])
    monkeypatch.setattr(tables, "MAX_HORIZONTAL", len(NAMES))  # with background they are rotated, without it not
    monkeypatch.setattr(charts, "COLOURS", 2)  # the two classifiers share a chart, the five rows have panels
    monkeypatch.setattr(report, "document", lambda results: caught.append(results) or "")
    raw = marked()
    drawn.experiment(raw)
    (results,) = caught
    index = copy.copy(results.index)
    index.classes = hostile(index.classes)
    page = document(dataclasses.replace(hostile(results), index=index))
    shown, expected = Outline(page), Outline(document(results))
    assert HOSTILE not in page
    assert shown.tags == expected.tags
    assert shown.values["class"].count("class") == len(NAMES) + 1 + len(NAMES) + 1  # upright: IoU, confusion
    for row in drawn.RAW["segmentations"]:
        assert shown.texts["th"].count(row + HOSTILE) >= 3  # methods, protocol, IoU by class
        assert row + HOSTILE in shown.texts["text"]  # SVG
        assert row + HOSTILE in shown.texts["title"]  # tooltip of the training's loss
        assert row + HOSTILE in shown.texts["span"]  # heading of its panel
        assert f"Training loss of segmentations: {row}{HOSTILE}" in shown.values["aria-label"]
        assert any(alt.startswith(f"{row}{HOSTILE} of ") for alt in shown.values["alt"])
    for name in NAMES:
        assert name + HOSTILE in shown.texts["th"]
        assert name + HOSTILE in shown.texts["i"]  # beside its colour in the legend
    assert f"{raw['experiment'].replace(MARK, HOSTILE)}: weakly supervised segmentation" in shown.texts["h1"]
    assert f"head of drs{HOSTILE}, i000" in shown.values["alt"]
    for found, plain in ((shown.texts, expected.texts), (shown.values, expected.values)):
        for key in plain.keys() - {"x", "cx", "d", "points"}:  # the dot chart's margin grows with the names
            assert found[key] == [value.replace(MARK, HOSTILE) for value in plain[key]], key


def test_an_unknown_name_in_a_template_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        ENVIRONMENT.from_string("{{ misspelt }}").render()


def test_templates_are_package_data() -> None:
    project = tomllib.loads((TEMPLATES.parents[2] / "pyproject.toml").read_text())
    (pattern,) = project["tool"]["setuptools"]["package-data"]["pipeline.report"]
    package = TEMPLATES.parent
    assert set(package.glob(pattern)) == set(TEMPLATES.iterdir())
    assert {path.suffix for path in TEMPLATES.iterdir()} == {".j2", ".css"}
