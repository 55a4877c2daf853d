"""DRS's label rule on hand-worked pixels."""

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.labels.rules import label_image
from pipeline.params import read, validate
from pipeline.schema import Crf, PseudoLabels
from tests.pixel import label
from tests.project import ROOT

PAPER = PseudoLabels(
    "localizations/x",
    rule="drs",
    normalise="none",
    attention_threshold=0.2,
    saliency_threshold=0.06,
    conflict_threshold=1.0,
)
CODE = PseudoLabels(
    "localizations/x",
    rule="drs",
    normalise="none",
    attention_threshold=0.2,
    saliency_threshold=51 / 255,
    conflict_threshold=0.9,
)


@pytest.mark.parametrize(
    ("saliency", "cat", "dog", "expected"),
    [
        (0, 0, 0, 0),  # background cue alone
        (255, 200, 0, 3),  # object cue alone
        (255, 100, 120, 5),  # of two object cues the stronger
        (255, 100, 100, 3),  # of equals the lower id
        (255, 0, 0, 255),  # neither
        (255, 51, 0, 255),  # 0.2 itself is no object cue
        (255, 52, 0, 3),
        (0, 255, 0, 0),  # both: background counts 1
        (15, 0, 0, 0),  # 15/255 is below 0.06
        (16, 0, 0, 255),  # 16/255 is not
        (16, 255, 0, 3),
        (255, 255, 250, 3),
    ],
)
def test_the_paper_pixel_by_pixel(saliency: int, cat: int, dog: int, expected: int) -> None:
    assert label(PAPER, saliency, cat=cat, dog=dog) == expected


@pytest.mark.parametrize(("saliency", "expected"), [(15, 0), (16, 0), (50, 0), (51, 3)])
def test_beta_decides_between_the_paper_and_the_code(saliency: int, expected: int) -> None:
    """A pixel of saliency 16 to 50 with an object cue is an object in the paper, background in the code."""
    assert label(CODE, saliency, cat=200) == expected
    assert label(PAPER, saliency, cat=200) == (0 if saliency <= 15 else 3)


def test_more_than_two_strong_scores_are_ignored_by_the_code_alone() -> None:
    strong = {"cat": 250, "dog": 240, "horse": 235}
    assert label(CODE, 255, **strong) == 255
    assert label(PAPER, 255, **strong) == 3
    assert label(CODE, 255, cat=250, dog=240, horse=229) == 3  # 229/255 is below 0.9
    assert label(CODE, 0, cat=250, dog=240) == 255  # the background counts among them


def test_the_crf_leaves_pixels_without_a_cue_ignored() -> None:
    saliency = np.zeros((24, 24), np.uint8)
    saliency[:, 8:] = 255
    cat = np.zeros((24, 24), np.uint8)
    cat[:, 8:16] = 200
    image = np.zeros((24, 24, 3), np.uint8)
    image[:, 8:] = 200
    rule = PseudoLabels(**{**PAPER.__dict__, "crf": Crf()})
    found = label_image({3: cat}, saliency, image, rule, (24, 24))
    assert np.all(found[:, :7] == 0)
    assert np.all(found[:, 9:16] == 3)
    assert np.all(found[:, 17:] == 255)


def test_without_saliency_it_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="background cues from saliency"):
        label_image({}, None, None, PseudoLabels("x", rule="drs", saliency=False), (2, 2))
    raw = read([ROOT / "params.yaml"])
    raw["pseudo_labels"]["cam"] |= {"rule": "drs", "saliency": False}
    with pytest.raises(PipelineError, match=r"pseudo_labels\.cam\.saliency: is false, but rule drs"):
        validate(raw)
