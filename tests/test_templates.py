"""The report's templates: they escape every name, refuse misspelt variables and are installed with the package."""

import copy
import dataclasses
import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError

from pipeline.report import charts, tables
from pipeline.report.page import ENVIRONMENT, TEMPLATES
from pipeline.report.photos import Photo, PhotoGallery
from pipeline.report.sections import Results, document
from stages import report
from tests import drawn

MARK = "_x1x"  # ends every name that a user chooses
HOSTILE = """"'><script>&lt;{{ 7 }}<!--\u2028\u2029"""
END = "</script>"  # is added to names of photos and classes, but no block's name may have a slash
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
    """The drawn experiment; its name and those of its dataset, rows and classifiers end with MARK."""
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


def with_marked_names(photos: PhotoGallery) -> PhotoGallery:
    def marked_photo(photo: Photo) -> Photo:
        image = dataclasses.replace(photo.source.image, id=f"{photo.source.image.id}{MARK}{END}")
        return dataclasses.replace(photo, source=dataclasses.replace(photo.source, image=image))

    names = [name + END for name in photos.names]
    return dataclasses.replace(photos, names=names, photos=[marked_photo(photo) for photo in photos.photos])


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


@pytest.mark.parametrize("own", [False, True])
def test_names_are_escaped_everywhere(own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Params refuse such names of blocks, class names and experiments may hold anything; the page trusts neither.

    Args:
        own: the photos are the user's own, with a gallery whose data are JSON in a script.
    """
    caught: list[Results] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drawn, "NAMES", [name + MARK for name in NAMES])
    monkeypatch.setattr(tables, "MAX_HORIZONTAL", len(NAMES))  # with background they are rotated, without it not
    monkeypatch.setattr(charts, "COLOURS", 2)  # the two classifiers share a chart, the five rows have panels
    monkeypatch.setattr(report, "document", lambda results: caught.append(results) or "")
    raw = marked()
    if own:
        del raw["dataset"]["demo"]
    drawn.experiment(raw)
    (results,) = caught
    if own:
        assert results.photos
        results = dataclasses.replace(results, photos=with_marked_names(results.photos))
    index = copy.copy(results.index)
    index.classes = hostile(index.classes)
    page = document(dataclasses.replace(hostile(results), index=index))
    shown, expected = Outline(page), Outline(document(results))
    assert HOSTILE not in page
    assert not set("\u2028\u2029") & set("".join(re.findall(r"<script.*?</script>", page, re.DOTALL)))
    assert shown.tags == expected.tags
    assert ("script" in shown.texts) is own
    if own:
        found, plain = (json.loads(outline.texts.pop("script")[0]) for outline in (shown, expected))
        assert found == hostile(plain)
        assert found["id"][0] == f"i008{HOSTILE}{END}"
        assert found["classes"]["1"][0] == f"circle{HOSTILE}{END}"
        assert any(text.startswith(f"circle{HOSTILE}{END} (") for text in shown.texts["option"])
    assert shown.values["class"].count("class") == len(NAMES) + 1 + len(NAMES) + 1  # upright: IoU, confusion
    for row in drawn.RAW["segmentations"]:
        assert shown.texts["th"].count(row + HOSTILE) >= 4  # methods, chart, protocol, IoU by class
        assert row + HOSTILE in shown.texts["title"]  # tooltip of the training's loss
        assert row + HOSTILE in shown.texts["span"]  # heading of its panel
        assert f"Training loss of segmentations: {row}{HOSTILE}" in shown.values["aria-label"]
        assert any(alt.startswith(f"{row}{HOSTILE} of ") for alt in shown.values["alt"])
    for name in NAMES:
        assert name + HOSTILE in shown.texts["th"]
        assert name + HOSTILE in shown.texts["i"]  # beside its colour in the legend
    assert f"{raw['experiment'].replace(MARK, HOSTILE)}: weakly supervised segmentation" in shown.texts["h1"]
    assert f"head of drs{HOSTILE}, i000" in shown.values["alt"]
    for there, usual in ((shown.texts, expected.texts), (shown.values, expected.values)):
        for key in usual:
            assert there[key] == [value.replace(MARK, HOSTILE) for value in usual[key]], key


def test_an_unknown_name_in_a_template_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        ENVIRONMENT.from_string("{{ misspelt }}").render()


def test_templates_are_package_data() -> None:
    project = tomllib.loads((TEMPLATES.parents[2] / "pyproject.toml").read_text())
    (pattern,) = project["tool"]["setuptools"]["package-data"]["pipeline.report"]
    package = TEMPLATES.parent
    assert set(package.glob(pattern)) == set(TEMPLATES.iterdir())
    assert {path.suffix for path in TEMPLATES.iterdir()} == {".j2", ".css", ".js"}
