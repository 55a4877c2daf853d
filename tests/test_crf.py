"""The dense CRF against direct calls of pydensecrf, and its effect on a noisy edge."""

import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.config.schema import Crf
from pipeline.errors import PipelineError
from pipeline.labels.crf import dense_crf

HEIGHT, WIDTH = 32, 44


def scene() -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Two coloured discs on grey, with noisy probabilities of background and two classes."""
    random = np.random.default_rng(3)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    truth = np.where((y - 15) ** 2 + (x - 13) ** 2 < 90, 1, 0)
    truth[(y - 18) ** 2 + (x - 32) ** 2 < 60] = 2
    colours = np.array([[90, 100, 110], [200, 60, 40], [40, 60, 210]])
    image = np.clip(colours[truth] + random.normal(0, 6, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)
    scores = 0.5 * np.eye(3)[truth].transpose(2, 0, 1) + random.random((3, HEIGHT, WIDTH)) * 0.6 + 0.05
    return image, (scores / scores.sum(0)).astype(np.float32)


def direct(image: NDArray[np.uint8], probabilities: NDArray[np.float32], settings: Crf) -> NDArray[np.float32]:
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    from pydensecrf.utils import unary_from_softmax

    field = densecrf.DenseCRF2D(WIDTH, HEIGHT, len(probabilities))
    field.setUnaryEnergy(unary_from_softmax(probabilities))
    field.addPairwiseGaussian(sxy=settings.gaussian_xy, compat=settings.gaussian_weight)
    field.addPairwiseBilateral(
        sxy=settings.bilateral_xy, srgb=settings.bilateral_rgb, rgbim=image, compat=settings.bilateral_weight
    )
    return np.array(field.inference(settings.iterations)).reshape(probabilities.shape)


def test_marginals_are_pydensecrfs() -> None:
    image, probabilities = scene()
    settings = Crf(
        iterations=4, gaussian_xy=2, gaussian_weight=1, bilateral_xy=30, bilateral_rgb=12, bilateral_weight=6
    )
    found = dense_crf(image, probabilities, settings)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, direct(image, probabilities, settings), atol=1e-6)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)


def test_present_classes_give_the_labels_of_all_21() -> None:
    image, probabilities = scene()
    present = [0, 7, 15]
    everything = np.full((21, HEIGHT, WIDTH), 1e-5, np.float32)
    everything[present] = probabilities
    settings = Crf(bilateral_rgb=12)
    labels = np.array(present)[dense_crf(image, probabilities, settings).argmax(0)]
    np.testing.assert_array_equal(labels, direct(image, everything, settings).argmax(0))


def test_follows_colours_rather_than_noise() -> None:
    image, probabilities = scene()
    clean = dense_crf(image, probabilities, Crf(bilateral_rgb=20)).argmax(0)
    truth = np.where(image[..., 0] > 150, 1, np.where(image[..., 2] > 150, 2, 0))
    assert (probabilities.argmax(0) != truth).mean() > 0.02
    assert (clean != truth).mean() < 0.005


def test_any_memory_layout_and_zero_probabilities() -> None:
    image, probabilities = scene()
    probabilities[2, :, :20] = 0
    expected = dense_crf(image, probabilities, Crf())
    strided = np.ascontiguousarray(probabilities.transpose(1, 2, 0)).transpose(2, 0, 1)
    flipped = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    np.testing.assert_array_equal(dense_crf(flipped, strided, Crf()), expected)
    assert np.isfinite(expected).all()


def test_background_alone_is_certain() -> None:
    image, _ = scene()
    assert (dense_crf(image, np.ones((1, HEIGHT, WIDTH), np.float32), Crf()) == 1).all()


@pytest.mark.parametrize("image", [np.zeros((3, HEIGHT, WIDTH), np.uint8), np.zeros((HEIGHT, WIDTH, 3), np.float32)])
def test_an_image_of_another_shape_or_dtype_is_refused(image: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="the image must be 32x44x3 uint8"):
        dense_crf(image, np.ones((2, HEIGHT, WIDTH), np.float32), Crf())


def test_without_pydensecrf_the_error_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(PipelineError, match="pip install pydensecrf2"):
        dense_crf(*scene(), Crf())


def test_the_ends_of_the_ranges_are_computed() -> None:
    """Beyond them, the library reads memory that is not its own, or returns NaN."""
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (20, 20, 3)).astype(np.uint8)
    probabilities = random.dirichlet([1, 1, 1], (20, 20)).astype(np.float32).transpose(2, 0, 1).copy()
    for width in (0.01, 1e300):
        for weight in (0.0, 1e6):
            settings = Crf(3, width, weight, width, width, weight)
            assert np.isfinite(dense_crf(image, probabilities, settings)).all()
