"""IRN's confident labels, and background scores computed from the class scores."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.config.params import read, validate
from pipeline.config.schema import Crf
from pipeline.errors import PipelineError
from pipeline.labels import confident
from pipeline.labels.background import Power
from pipeline.labels.confident import Confident
from pipeline.labels.crf import dense_crf
from pipeline.labels.labelling import label_image
from pipeline.labels.threshold import Threshold
from pipeline.stores.raster import Raster
from tests.project import ROOT

RULE = Confident(high=0.3, low=0.05, certainty=0.7, crf=Crf(10, 3, 3, 50, 5, 10))


def grey(*rows: list[float]) -> Raster:
    return np.rint(np.array(rows) * 255).astype(np.uint8)


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.float32]]:
    """Probabilities passed to a CRF that returns them unchanged."""
    found: list[NDArray[np.float32]] = []

    def unchanged(image: Any, probabilities: NDArray[np.float32], settings: Crf) -> NDArray[np.float32]:
        assert settings == RULE.crf
        found.append(probabilities)
        return probabilities

    monkeypatch.setattr(confident, "dense_crf", unchanged)
    return found


def test_objects_background_and_ignored_pixels(inputs: list[NDArray[np.float32]]) -> None:
    """The class exceeds both backgrounds, one or none. Of two classes the stronger one in the ``high`` pass wins."""
    maps = {3: grey([0.31, 0.29, 0.06, 0.04, 0.5, 0.0]), 7: grey([0.0, 0.0, 0.0, 0.04, 0.6, 0.0])}
    image = np.zeros((1, 6, 3), np.uint8)
    assert label_image(maps, None, image, RULE, "none", (1, 6)).tolist() == [[3, 255, 255, 0, 7, 0]]
    first, second = inputs
    assert first[:, 0, 0].tolist() == pytest.approx([0.15, 0.7, 0.15])  # 0.3 shared by the two others
    assert first[:, 0, 1].tolist() == pytest.approx([0.7, 0.15, 0.15])
    assert second[:, 0, 1].tolist() == pytest.approx([0.15, 0.7, 0.15])
    for chances in inputs:
        np.testing.assert_allclose(chances.sum(0), 1, atol=1e-6)


def test_it_uses_the_settings_of_the_rule(inputs: list[NDArray[np.float32]]) -> None:
    rule = replace(RULE, high=0.6, low=0.33, certainty=0.9)  # AMR's backgrounds
    labels = label_image({3: grey([0.61, 0.59, 0.34, 0.32])}, None, np.zeros((1, 4, 3), np.uint8), rule, "none", (1, 4))
    assert labels.tolist() == [[3, 255, 255, 0]]
    assert inputs[0][:, 0, 0].tolist() == pytest.approx([0.1, 0.9])


def test_where_the_passes_disagree_on_an_object_the_first_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the CRF: 3, 3, 3, background, background; and 3, 7, background, 7, background."""
    answers = iter([[1, 1, 1, 0, 0], [1, 2, 0, 2, 0]])

    def answer(image: Any, probabilities: NDArray[np.float32], settings: Crf) -> NDArray[np.float32]:
        return np.eye(3, dtype=np.float32)[next(answers)].T[:, None]

    monkeypatch.setattr(confident, "dense_crf", answer)
    maps = {3: np.zeros((1, 5), np.uint8), 7: np.zeros((1, 5), np.uint8)}
    labels = label_image(maps, None, np.zeros((1, 5, 3), np.uint8), RULE, "none", (1, 5))
    assert labels.tolist() == [[3, 3, 3, 255, 0]]


def test_it_equals_two_explicit_crf_passes() -> None:
    random = np.random.default_rng(0)
    image = random.integers(0, 255, (20, 24, 3)).astype(np.uint8)
    image[:, :10] //= 4
    maps = {2: grey(*(random.random((20, 24)) * np.linspace(0.6, 0, 24)))}
    sides = []
    for background in (0.3, 0.05):
        foreground = maps[2] / 255 > background
        chances = np.where(foreground, [[[0.3]], [[0.7]]], [[[0.7]], [[0.3]]]).astype(np.float32)
        sides.append(dense_crf(image, chances, RULE.crf).argmax(0))
    expected = np.where(sides[0] == 1, 2, np.where(sides[1] == 0, 0, 255))
    found = label_image(maps, None, image, RULE, "none", (20, 24))
    assert np.array_equal(found, expected)
    assert set(np.unique(found)) == {0, 2, 255}


def test_without_a_class_all_pixels_are_background() -> None:
    assert not label_image({}, None, np.zeros((4, 5, 3), np.uint8), RULE, "none", (4, 5)).any()


def test_it_needs_only_the_image() -> None:
    assert RULE.needs_image
    assert not RULE.needs_saliency
    with pytest.raises(ValueError, match="needs the image, but there is none"):
        label_image({}, None, None, RULE, "none", (1, 1))


def test_low_is_at_most_high_and_certainty_is_a_probability() -> None:
    data = read([ROOT / "params.yaml"])
    where = "params.yaml: pseudo_labels.cam.rule.confident"
    for settings, fault in [
        ({"high": 0.1, "low": 0.2}, "low: 0.2 is above high, 0.1; exchange the two"),
        ({"certainty": 1.0}, "certainty: 1.0 must be above 0 and below 1"),
        ({"crf": None}, "crf: must be a mapping, not null"),
    ]:
        data["pseudo_labels"]["cam"]["rule"] = {"confident": settings}
        with pytest.raises(PipelineError) as caught:
            validate(data, resolve=True)
        assert caught.value.lines == (f"{where}.{fault}",)


@pytest.mark.parametrize(
    ("power", "expected"),
    [(1.0, [0, 0, 3, 3, 7]), (8.0, [0, 3, 3, 3, 7])],  # 1 - 0.4 is above 0.4, 0.6^8 = 0.017 is not
)
def test_background_of_the_strongest_class(power: float, expected: list[int]) -> None:
    rule = Threshold(background=Power(power))
    maps = {3: grey([0.1, 0.4, 0.6, 1.0, 0.2]), 7: grey([0.0, 0.3, 0.1, 0.0, 0.7])}
    assert label_image(maps, None, None, rule, "none", (1, 5)).tolist() == [expected]


def test_the_background_of_classes_replaces_that_of_saliency() -> None:
    rule = Threshold(background=Power(1.0))
    salient = np.zeros((1, 2), np.uint8)
    assert label_image({3: grey([0.4, 0.6])}, salient, None, rule, "none", (1, 2)).tolist() == [[0, 3]]
    without = Threshold(background="saliency")
    assert label_image({3: grey([0.4, 0.6])}, salient, None, without, "none", (1, 2)).tolist() == [[0, 0]]
    assert not label_image({}, salient, None, rule, "none", (1, 2)).any()
