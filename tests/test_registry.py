"""Registries, choices among their entries, and how params files with choices lie on each other."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest

from pipeline.config import params
from pipeline.config.reader import Range, build_block
from pipeline.config.registry import Choice, Registry, plain
from pipeline.errors import PipelineError

RULES: Registry[Any] = Registry("RULES", "tests", "rule")


@RULES.register("fixed")
@dataclass(frozen=True)
class Fixed:
    level: Annotated[float, Range(least=0, most=1)] = 0.5
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    rule: Annotated[Choice, RULES] = field(default_factory=lambda: Choice(RULES, "fixed"))


def read(value: Any) -> tuple[Block | None, list[str]]:
    faults: list[str] = []
    return build_block(Block, value, "labels.a", faults), faults


class TestChoice:
    @pytest.mark.parametrize("value", ["fixed", {"fixed": None}, {"fixed": {}}, {"fixed": {"level": 0.5}}])
    def test_a_name_alone_means_default_settings(self, value: Any) -> None:
        block, faults = read({"rule": value})
        assert faults == []
        assert block == Block()
        assert block is not None
        assert block.rule.settings == Fixed()

    def test_settings_are_checked_when_they_are_first_asked_for(self) -> None:
        block, faults = read({"rule": {"fixed": {"level": 2, "nmes": []}}})
        assert faults == []
        assert block is not None
        with pytest.raises(PipelineError) as error:
            _ = block.rule.settings
        assert list(error.value.lines) == [
            "labels.a.rule.fixed.nmes: unknown key; did you mean names?",
            "labels.a.rule.fixed.level: 2.0 must be at least 0 and at most 1",
        ]

    @pytest.mark.parametrize(
        ("value", "fault"),
        [
            ("fixd", "labels.a.rule: 'fixd' is none of fixed; did you mean fixed?"),
            ({"fixed": {}, "other": {}}, "labels.a.rule: must be NAME or {NAME: {...}}, not"),
            ({"fixed": 3}, "labels.a.rule: must be NAME or {NAME: {...}}, not {'fixed': 3}"),
            (7, "labels.a.rule: must be NAME or {NAME: {...}}, not 7"),
        ],
    )
    def test_anything_else_is_refused(self, value: Any, fault: str) -> None:
        _, (found,) = read({"rule": value})
        assert found.startswith(fault)

    def test_plain_writes_what_can_be_read_back(self) -> None:
        block, _ = read({"rule": {"fixed": {"names": ["a"]}}})
        written = plain(block)
        assert written == {"rule": {"fixed": {"level": 0.5, "names": ["a"]}}}
        assert read(written)[0] == block


def test_a_registry_finds_names_in_files_that_it_has_not_imported() -> None:
    found = Registry[Any]("RULES", "tests", "rule")
    assert found.names() == ["fixed"]
    assert "fixed" in found
    assert "other" not in found
    assert found.file("fixed") == Path(__file__)
    with pytest.raises(PipelineError, match="'other' is none of fixed"):
        _ = found["other"]


@pytest.mark.parametrize(
    ("below", "above", "merged"),
    [
        ({"drs": {"alpha": 1}}, {"drs": {"beta": 2}}, {"drs": {"alpha": 1, "beta": 2}}),
        ({"drs": {"alpha": 1}}, "drs", {"drs": {"alpha": 1}}),
        ({"drs": {"alpha": 1}}, "oaa", "oaa"),
        ({"drs": {"alpha": 1}}, {"oaa": {"conflict": 2}}, {"oaa": {"conflict": 2}}),
        ("drs", {"drs": {"alpha": 1}}, {"drs": {"alpha": 1}}),
        ("drs", "oaa", "oaa"),
    ],
)
def test_a_choice_keeps_settings_only_of_the_same_name(below: Any, above: Any, merged: Any) -> None:
    files = [{"pseudo_labels": {"x": {"rule": rule}}} for rule in (below, above, merged)]
    assert params.merge(files[0], files[1]) == files[2]


def test_a_key_that_appears_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("seed: 1\nclassifiers: {a: {}}\nclassifiers: {b: {}}\n")
    with pytest.raises(PipelineError, match=r"p\.yaml: not YAML: the key classifiers appears twice .*line 3"):
        params.read([file])


@pytest.mark.parametrize(("value", "fits"), [(0, True), (1, True), (-0.1, False), (1.1, False), (float("nan"), False)])
def test_a_range_holds_its_bounds(value: float, fits: bool) -> None:
    assert (Range(least=0, most=1).fault(value) is None) == fits


@pytest.mark.parametrize(("value", "fits"), [(0, False), (0.1, True), (0.9, True), (1, False), (float("inf"), False)])
def test_an_open_range_leaves_out_its_bounds(value: float, fits: bool) -> None:
    assert (Range(above=0, below=1).fault(value) is None) == fits
