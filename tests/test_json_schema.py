"""The JSON Schema for editors: it is up to date, accepts every params file of the project and finds slips."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from pipeline.config.json_schema import params_schema
from tests.project import ROOT

SCHEMA: dict[str, Any] = json.loads((ROOT / "params.schema.json").read_text())
FILES = [
    ROOT / "params.yaml",
    *sorted((ROOT / "profiles").glob("*.yaml")),
    *sorted((ROOT / "profiles/tables").glob("*.yaml")),
]


def faults(params: object) -> list[str]:
    return [error.json_path for error in Draft202012Validator(SCHEMA).iter_errors(params)]


def test_the_committed_schema_is_the_generated_one() -> None:
    """Run: python -m pipeline.config.json_schema > params.schema.json"""
    assert params_schema() == SCHEMA


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_params_file_names_the_schema_and_is_valid(file: Path) -> None:
    text = file.read_text()
    first = text.splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (file.parent / first.partition("=")[2]).resolve() == ROOT / "params.schema.json"
    assert faults(yaml.safe_load(text)) == []


@pytest.mark.parametrize(
    ("params", "fault"),
    [
        ({"sede": 1}, "$"),
        ({"seed": -1}, "$.seed"),
        ({"classifiers": {"a": {"training": {"lr": 0}}}}, "$.classifiers.a.training.lr"),
        ({"classifiers": {"a": {"method": "can"}}}, "$.classifiers.a.method"),
        ({"pseudo_labels": {"a": {"rule": {"drs": {"alfa": 0.2}}}}}, "$.pseudo_labels.a.rule"),
        ({"defaults": {"classifiers": {"backbone": {"name": "vgg"}}}}, "$.defaults.classifiers.backbone.name"),
        ({"segmentations": {"a": {"labels": 3}}}, "$.segmentations.a.labels"),
    ],
)
def test_slips_are_found_at_their_key(params: object, fault: str) -> None:
    assert faults(params) == [fault]
