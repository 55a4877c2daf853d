"""Rows that need masks or saliency maps that are not there are left out, and that is said once."""

from pathlib import Path

import pytest

from pipeline.config import params as parameters
from pipeline.config import references
from pipeline.config.schema import Params
from pipeline.errors import PipelineError
from pipeline.workflow.graph import Graph
from tests.project import ROOT

FILE = ROOT / "params.yaml"


def load(lines: list[str], **overrides: object) -> Params:
    return parameters.load([FILE], overrides, notice=lines.append)


def test_without_masks_the_supervised_row_is_left_out() -> None:
    lines: list[str] = []
    found = load(lines, dataset={"masks": None})
    assert lines == ["rows left out, since they need masks, but dataset.masks is null: supervised"]
    assert "supervised" not in references.rows(found)
    assert set(references.rows(found)) == set(references.rows(load([]))) - {"supervised"}
    jobs = {job.label for job in Graph(found).jobs}
    assert not any("supervised" in label for label in jobs)
    assert "report" in jobs


def test_without_saliency_the_rows_that_read_it_are_left_out() -> None:
    lines: list[str] = []
    found = load(lines, saliency={"kind": "none"})
    assert lines[0].startswith("rows left out, since they need saliency maps, but saliency.kind is none: cam, oaa, ")
    assert lines[1] == f"metrics.json holds the scores of {found.method}, since oaa_plus is left out"
    assert found.method in references.rows(found)
    assert {"amr", "seam", "cam_irn", "edam", "agen", "supervised"} <= set(references.rows(found))
    assert not any(block.rule.settings.needs_saliency for block in found.pseudo_labels.values())


def test_if_no_row_is_left_it_is_an_error() -> None:
    with pytest.raises(PipelineError, match=r"need masks, but dataset\.masks is null: supervised; no row is left"):
        load([], dataset={"masks": None}, rows=["supervised"], method="supervised")


def test_every_row_remains_for_the_placeholders_of_dvc() -> None:
    raw = parameters.read([Path(FILE)], {"dataset": {"masks": None}})
    assert "supervised" in parameters.validate(raw, every_row=True).segmentations
