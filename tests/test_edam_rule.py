"""EDAM's label rule, Algorithm 1 of the paper, on hand-worked pixels."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.config.schema import Crf
from pipeline.labels import base
from pipeline.labels.background import Power
from pipeline.labels.base import LabelCrf
from pipeline.labels.edam import Edam
from pipeline.labels.labelling import label_image
from pipeline.stores.raster import Raster
from tests.pixel import label

THETA = 20  # grey levels
PAPER = Edam(background=0.1, alpha=0.25, beta=0.95, theta=THETA / 255)


@pytest.mark.parametrize(
    ("saliency", "cat", "dog", "expected"),
    [
        (255, 200, 100, 3),  # salient, and the class score is at least alpha
        (255, 100, 200, 5),
        (255, 60, 0, 0),  # salient, but no class reaches alpha: suppressed
        (255, 63, 0, 0),  # 63/255 is below 0.25
        (255, 64, 0, 3),
        (255, 20, 10, 0),  # background wins the argmax, whatever the saliency
        (0, 200, 0, 0),  # not salient, and no class is above beta
        (0, 242, 0, 0),  # 242/255 is below 0.95
        (0, 243, 0, 3),  # not salient, but above beta: pops up
        (0, 250, 255, 5),  # several above beta: the highest wins
        (0, 250, 250, 3),  # a tie: the lower id wins
        (0, 0, 0, 0),
        (THETA - 1, 200, 0, 0),
        (THETA, 200, 0, 3),  # saliency equal to theta is salient
        (THETA, 60, 0, 0),
    ],
)
def test_algorithm_1_pixel_by_pixel(saliency: int, cat: int, dog: int, expected: int) -> None:
    assert label(PAPER, saliency, cat=cat, dog=dog) == expected


def test_the_ablations_of_table_7() -> None:
    """Without alpha no salient pixel is suppressed; without beta no pixel pops up."""
    without_alpha = replace(PAPER, alpha=0)
    assert label(without_alpha, 255, cat=60) == 3
    assert label(without_alpha, 0, cat=200) == 0
    without_beta = replace(PAPER, beta=1)
    assert label(without_beta, 0, cat=255) == 0
    assert label(without_beta, 255, cat=60) == 0


def test_a_score_of_alpha_is_kept_and_one_of_beta_is_not() -> None:
    """51/255 equals 0.2 and 204/255 equals 0.8 exactly."""
    assert label(replace(PAPER, alpha=0.2), 255, cat=51) == 3
    assert label(replace(PAPER, alpha=0.2), 255, cat=50) == 0
    assert label(replace(PAPER, beta=0.8), 0, cat=204) == 0
    assert label(replace(PAPER, beta=0.8), 0, cat=205) == 3


def test_background_is_final() -> None:
    """A background score above alpha and beta does not turn the pixel into an object."""
    rule = replace(PAPER, background=0.99)
    assert label(rule, 255, cat=250) == 0
    assert label(rule, 0, cat=250) == 0
    assert label(rule, 0, cat=253) == 3


def test_the_backgrounds_score_is_a_constant_or_a_power_never_the_saliency() -> None:
    assert label(PAPER, 255, cat=64) == label(replace(PAPER, background=0.2), THETA, cat=64) == 3
    assert label(replace(PAPER, background=0.26), 255, cat=64) == 0
    power = replace(PAPER, background=Power(1.0))
    assert label(power, 255, cat=127) == 0  # 1 - 0.498 is more
    assert label(power, 255, cat=128) == 3
    assert label(power, 255, cat=120, dog=130) == 5
    assert label(replace(power, background=Power(2.0)), 255, cat=100) == 3  # 0.608^2 = 0.369 is less than 0.392
    assert label(replace(power, background=Power(2.0)), 255, cat=96) == 0  # 0.624^2 = 0.389 is more than 0.376


def test_golden() -> None:
    """Eight pixels and two classes cover every branch."""
    cat = np.array([[250, 200, 50, 10, 200, 245, 255, 0]], np.uint8)
    dog = np.array([[10, 210, 40, 5, 100, 250, 100, 255]], np.uint8)
    saliency = np.array([[255, 120, 255, 255, 19, 0, 5, 20]], np.uint8)
    found = label_image({3: cat, 5: dog}, saliency, None, PAPER, "none", (1, 8))
    assert found.tolist() == [[3, 5, 0, 0, 0, 5, 3, 5]]
    assert found.dtype == np.uint8
    assert not label_image({}, saliency, None, PAPER, "none", (1, 8)).any()  # an image without tags


class TestCrf:
    def test_the_thresholds_apply_to_the_marginals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[NDArray[np.float32]] = []

        def marginals(image: Any, probabilities: NDArray[np.float32], settings: Crf) -> NDArray[np.float32]:
            given.append(probabilities)
            return np.array([[[0.1, 0.1, 0.02, 0.9]], [[0.9, 0.9, 0.98, 0.1]]], np.float32)

        monkeypatch.setattr(base, "dense_crf", marginals)
        rule = replace(PAPER, crf=LabelCrf(), background=0.4)
        maps, saliency = {5: np.array([[51, 255, 51, 255]], np.uint8)}, np.array([[255, 0, 0, 255]], np.uint8)
        image = np.zeros((1, 4, 3), np.uint8)
        assert label_image(maps, saliency, image, rule, "none", (1, 4)).tolist() == [[5, 0, 5, 0]]
        assert given[0][:, 0, 0].tolist() == pytest.approx([2 / 3, 1 / 3])
        unsure = replace(rule, crf=LabelCrf(confidence=0.95))
        assert label_image(maps, saliency, image, unsure, "none", (1, 4)).tolist() == [[255, 255, 5, 255]]

    def test_it_moves_the_label_to_the_edge(self) -> None:
        image = np.zeros((24, 32, 3), np.uint8)
        image[:, :16, 0], image[:, 16:, 2] = 200, 200
        attention: Raster = np.zeros((24, 32), np.uint8)
        attention[:, :14], attention[:, 14:16] = 255, 40
        saliency = np.where(np.arange(32) < 24, 255, 0).astype(np.uint8) * np.ones((24, 1), np.uint8)
        plain = replace(PAPER, background=Power(1.0))
        assert label_image({5: attention}, saliency, image, plain, "none", (24, 32))[:, 14:16].max() == 0
        refined = label_image(
            {5: attention}, saliency, image, replace(plain, crf=LabelCrf(bilateral_rgb=10)), "none", (24, 32)
        )
        assert np.array_equal(refined, np.where(np.arange(32) < 16, 5, 0) * np.ones((24, 1)))

    def test_it_needs_the_image(self) -> None:
        with pytest.raises(ValueError, match="needs the image, but there is none"):
            label_image({}, np.zeros((1, 1), np.uint8), None, replace(PAPER, crf=LabelCrf()), "none", (1, 1))


def test_it_needs_saliency() -> None:
    assert PAPER.needs_saliency
    with pytest.raises(ValueError, match="needs a saliency map, but there is none"):
        label_image({}, None, None, PAPER, "none", (2, 2))
