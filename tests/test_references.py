"""Rows of the report and what they are made of: ``rows`` in a params file keeps exactly these."""

import copy
from typing import Any

import pytest

from pipeline.config import references
from pipeline.config.params import merge, validate
from pipeline.config.schema import Params
from pipeline.config.stage_table import SECTIONS
from pipeline.errors import PipelineError

TRAINING = {"epochs": 1, "batch_size": 2, "lr": 0.1}
SMALL = {"name": "small"}
NETWORK = {"backbone": SMALL, "training": TRAINING}
JOINT = {
    "network": {"agen": {"shared": ["conv2", "conv2"]}},
    "backbones": {"classification": SMALL, "segmentation": SMALL},
    "training": TRAINING,
}
SURE = {"rule": "confident"}
LEARNER = {**NETWORK, "network": "deeplab_largefov"}
CHAINS: dict[str, Any] = {  # a row of each kind, on two classifiers and a one-step network
    "experiment": "chains",
    "seed": 1,
    "method": "finer",
    "dataset": {"root": "data/chains", "demo": {}, "masks": "SegmentationClass"},
    "saliency": {"kind": "fine_grained"},
    "classifiers": {"base": NETWORK, "other": NETWORK},
    "refinements": {"finer": {**NETWORK, "source": "localizations/base"}},
    "localizations": {
        "base": {"model": "classifiers/base"},
        "finer": {"model": "refinements/finer"},
        "joint": {"model": "one_step/joint"},
    },
    "affinities": {"base": {**NETWORK, "labels": "pseudo_labels/sure"}},
    "walks": {"walked": {"affinity": "affinities/base", "maps": "classifiers/other"}},
    "pseudo_labels": {
        "finer": {"source": "localizations/finer", "rule": "oaa"},
        "sure": {"source": "localizations/base", **SURE},
        "walked": {"source": "walks/walked", "rule": "oaa"},
        "joint": {"source": "localizations/joint", "rule": "oaa"},
    },
    "mixtures": {"mixed": {"labels": "pseudo_labels/finer", "share": 0.5}},
    "segmentations": {
        "finer": {**LEARNER, "labels": "pseudo_labels/finer"},
        "walked": {**LEARNER, "labels": "pseudo_labels/walked"},
        "mixed": {**LEARNER, "labels": "mixtures/mixed"},
        "two_step": {**LEARNER, "labels": "pseudo_labels/joint"},
        "supervised": {**LEARNER, "labels": "ground_truth"},
    },
    "one_step": {"joint": JOINT, "alone": JOINT},
    "boxes": {"drawn": {"model": "classifiers/other"}},
}
BOXED = {"boxes/drawn", "classifiers/other"}  # boxes are kept whatever the rows are
FINER = {"classifiers/base", "localizations/base", "refinements/finer", "localizations/finer", "pseudo_labels/finer"}
WALKED = {
    "classifiers/base",
    "localizations/base",
    "pseudo_labels/sure",
    "affinities/base",
    "classifiers/other",
    "walks/walked",
    "pseudo_labels/walked",
}
TWO_STEP = {"one_step/joint", "localizations/joint", "pseudo_labels/joint"}


def chains(**changes: Any) -> Params:
    return validate(merge(copy.deepcopy(CHAINS), changes), "p.yaml")


def blocks(params: Params) -> set[str]:
    """SECTION/NAME of all blocks."""
    return {f"{section}/{name}" for section in SECTIONS for name in getattr(params, section)}


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        (["finer"], FINER | {"segmentations/finer"}),
        (["walked"], WALKED | {"segmentations/walked"}),
        (["mixed"], FINER | {"mixtures/mixed", "segmentations/mixed"}),
        (["two_step"], TWO_STEP | {"segmentations/two_step"}),
        (["supervised"], {"segmentations/supervised"}),
        (["alone"], {"one_step/alone"}),
        (
            ["supervised", "alone", "finer"],
            FINER | {"segmentations/supervised", "one_step/alone", "segmentations/finer"},
        ),
        ([], set()),
    ],
)
def test_rows_keep_what_they_are_made_of_and_no_more(rows: list[str], kept: set[str]) -> None:
    assert blocks(chains(rows=rows, method=rows[0] if rows else "finer")) == kept | BOXED


def test_without_rows_everything_stays() -> None:
    params = chains()
    everything = {f"{section}/{name}" for section in SECTIONS for name in CHAINS[section]}
    assert blocks(params) == everything
    assert blocks(chains(rows=list(references.rows(params)))) == everything


def test_kept_blocks_stay_as_they_are() -> None:
    whole, some = chains(), chains(rows=["walked"], method="walked")
    for reference in WALKED | {"segmentations/walked"}:
        section, name = reference.split("/")
        assert getattr(some, section)[name] == getattr(whole, section)[name]


def test_rows_come_in_the_order_in_which_they_are_named() -> None:
    names = list(references.rows(chains()))
    assert names[-1] == "supervised"
    turned = names[::-1]
    assert list(references.rows(chains(rows=turned, method=turned[0]))) == turned


def test_an_unknown_row_is_one_line() -> None:
    rows = ", ".join(references.rows(chains()))
    with pytest.raises(PipelineError) as caught:
        chains(rows=["finer", "fine"])
    assert list(caught.value.lines) == [f"p.yaml: rows: fine is none of {rows}"]


def test_the_method_is_one_of_the_rows() -> None:
    with pytest.raises(PipelineError) as caught:
        chains(rows=["walked", "joint"])
    assert list(caught.value.lines) == ["p.yaml: method: finer is none of the rows walked, joint"]


def first_of(**changes: Any) -> Params:
    found = references.first_rows(chains(**changes))
    assert found is not None
    return found


def test_the_first_rows_are_rows_of_their_own() -> None:
    first = first_of(first=["walked", "finer"])
    assert list(references.rows(first)) == ["walked", "finer"]
    assert blocks(first) == WALKED | FINER | {"segmentations/walked", "segmentations/finer"}
    assert first.method == "finer"
    assert first_of(first=["walked", "alone"]).method == "walked"  # the method is not among them
    assert references.first_rows(first) is None


def test_first_rows_that_do_not_run_are_left_out() -> None:
    first = first_of(first=["walked", "finer"], rows=["finer", "supervised"])
    assert list(references.rows(first)) == ["finer"]


@pytest.mark.parametrize(
    "changes", [{}, {"first": ["walked"], "rows": ["finer", "mixed"]}, {"first": ["finer"], "rows": ["finer"]}]
)
def test_nothing_is_first_without_others(changes: dict[str, Any]) -> None:
    assert references.first_rows(chains(**changes)) is None


def test_an_unknown_first_row_is_one_line() -> None:
    rows = ", ".join(references.rows(chains()))
    with pytest.raises(PipelineError) as caught:
        chains(first=["fine"])
    assert list(caught.value.lines) == [f"p.yaml: first: fine is none of {rows}"]


def test_what_no_row_needs_is_checked_all_the_same() -> None:
    with pytest.raises(PipelineError, match=r"walks\.walked\.radius: 1 must be at least 2"):
        chains(rows=["supervised"], method="supervised", walks={"walked": {"radius": 1}})
