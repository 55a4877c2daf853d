"""Fully connected CRF (Kraehenbuehl and Koltun, NIPS 2011), with mean-field inference by pydensecrf."""

import numpy as np
from numpy.typing import NDArray

from pipeline.config.schema import Crf
from pipeline.errors import PipelineError

FLOOR = 1e-5  # smallest probability, so that its unary energy -log p is finite


def describe_crf(settings: Crf | None) -> str:
    """Return 'on (10 iterations)' or 'off'."""
    return "off" if settings is None else f"on ({settings.iterations} iterations)"


def dense_crf(image: NDArray[np.uint8], probabilities: NDArray[np.float32], settings: Crf) -> NDArray[np.float32]:
    """Run ``settings.iterations`` mean-field iterations and return the marginals.

    The run time grows with C, so pass only the background and the classes of the image. This does not change the
    labels: a class without unary evidence anywhere gains none from neighbours.

    Args:
        image: H x W x 3 uint8, RGB.
        probabilities: C x H x W float32, summing to 1 over C.

    Returns:
        C x H x W float32, summing to 1 over C.

    Raises:
        ValueError: the image has another shape or dtype.
        PipelineError: pydensecrf is not installed.
    """
    count, height, width = probabilities.shape
    if image.shape != (height, width, 3) or image.dtype != np.uint8:
        raise ValueError(f"the image must be {height}x{width}x3 uint8, not {image.shape} {image.dtype}")
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError as error:
        raise PipelineError(
            f"pydensecrf: cannot be imported ({error}); pip install pydensecrf2, or set crf: null"
        ) from None
    if count == 1:
        return np.ones_like(probabilities)

    field = DenseCRF2D(width, height, count)
    energies = -np.log(np.maximum(probabilities, FLOOR))
    field.setUnaryEnergy(np.ascontiguousarray(energies.reshape(count, -1), np.float32))
    field.addPairwiseGaussian(sxy=settings.gaussian_xy, compat=settings.gaussian_weight)
    field.addPairwiseBilateral(
        sxy=settings.bilateral_xy,
        srgb=settings.bilateral_rgb,
        rgbim=np.ascontiguousarray(image),
        compat=settings.bilateral_weight,
    )
    return np.array(field.inference(settings.iterations), np.float32).reshape(count, height, width)
