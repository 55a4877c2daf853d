"""DRS's label rule on hand-worked pixels."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.labels.base import LabelCrf
from pipeline.labels.drs import Drs
from pipeline.labels.labelling import label_image
from tests.pixel import label

PAPER = Drs(alpha=0.2, beta=0.06, conflict=1.0)
CODE = Drs(alpha=0.2, beta=51 / 255, conflict=0.9)


@pytest.mark.parametrize(
    ("saliency", "cat", "dog", "expected"),
    [
        (0, 0, 0, 0),  # only the background cue
        (255, 200, 0, 3),  # only an object cue
        (255, 100, 120, 5),  # two object cues: the stronger wins
        (255, 100, 100, 3),  # a tie: the lower id wins
        (255, 0, 0, 255),  # no cue
        (255, 51, 0, 255),  # a score of exactly 0.2 is no object cue
        (255, 52, 0, 3),
        (0, 255, 0, 0),  # both cues: the background scores 1
        (15, 0, 0, 0),  # 15/255 is below 0.06
        (16, 0, 0, 255),  # 16/255 is not below 0.06
        (16, 255, 0, 3),
        (255, 255, 250, 3),
    ],
)
def test_the_paper_pixel_by_pixel(saliency: int, cat: int, dog: int, expected: int) -> None:
    assert label(PAPER, saliency, cat=cat, dog=dog) == expected


@pytest.mark.parametrize(("saliency", "expected"), [(15, 0), (16, 0), (50, 0), (51, 3)])
def test_beta_decides_between_the_paper_and_the_code(saliency: int, expected: int) -> None:
    """A pixel with an object cue and saliency 16 to 50 is an object in the paper but background in the code."""
    assert label(CODE, saliency, cat=200) == expected
    assert label(PAPER, saliency, cat=200) == (0 if saliency <= 15 else 3)


def test_more_than_two_strong_scores_are_ignored_by_the_code_alone() -> None:
    strong = {"cat": 250, "dog": 240, "horse": 235}
    assert label(CODE, 255, **strong) == 255
    assert label(PAPER, 255, **strong) == 3
    assert label(CODE, 255, cat=250, dog=240, horse=229) == 3  # 229/255 is below 0.9
    assert label(CODE, 0, cat=250, dog=240) == 255  # the background counts as one of the three


def test_strong_scores_are_counted_pixel_by_pixel() -> None:
    """Three pixels with one strong class each do not conflict; neither do three scores at the threshold (204/255)."""
    maps = {3: np.full((1, 3), 250, np.uint8)}
    assert label_image(maps, np.full((1, 3), 255, np.uint8), None, CODE, "none", (1, 3)).tolist() == [[3, 3, 3]]
    rule = replace(CODE, conflict=0.8)
    assert label(rule, 255, cat=204, dog=204, horse=204) == 3
    assert label(rule, 255, cat=205, dog=205, horse=205) == 255


def test_the_crf_leaves_pixels_without_a_cue_ignored() -> None:
    saliency = np.zeros((24, 24), np.uint8)
    saliency[:, 8:] = 255
    cat = np.zeros((24, 24), np.uint8)
    cat[:, 8:16] = 200
    image = np.zeros((24, 24, 3), np.uint8)
    image[:, 8:] = 200
    rule = replace(PAPER, crf=LabelCrf())
    found = label_image({3: cat}, saliency, image, rule, "none", (24, 24))
    assert np.all(found[:, :7] == 0)
    assert np.all(found[:, 9:16] == 3)
    assert np.all(found[:, 17:] == 255)


def test_it_needs_saliency() -> None:
    assert PAPER.needs_saliency
    with pytest.raises(ValueError, match="needs a saliency map, but there is none"):
        label_image({}, None, None, PAPER, "none", (2, 2))
