"""Saliency maps: those the user brings, and two detectors that need no weights."""

import hashlib
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.checks import Unfit, saliency_values
from pipeline.data.index import Image
from pipeline.errors import PipelineError
from pipeline.stores.raster import Raster, RasterStore

DETECTORS = {
    "spectral_residual": "StaticSaliencySpectralResidual_create",  # Hou and Zhang, CVPR 2007
    "fine_grained": "StaticSaliencyFineGrained_create",  # Montabone and Soto, IVC 2010
}
SMOOTHING = 0.1  # sigma over the short side of the image


def read_file(image: Image) -> Raster:
    """The image's grey PNG from the folder that the index was made with: H x W uint8, value / 255.

    Raises:
        PipelineError: gone, changed since it was indexed, not 8-bit grey, or not of the image's size.
        ValueError: the index has no saliency map of the image.
    """
    path = image.saliency
    if path is None:
        raise ValueError(f"image {image.id} has no saliency map")
    try:
        data = path.read_bytes()
        found = saliency_values(data)
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read ({error.strerror}); run the index stage again") from None
    except Unfit as error:
        raise PipelineError(f"{path}: {error}") from None
    if image.saliency_sha256 not in (None, hashlib.sha256(data).hexdigest()):
        raise PipelineError(f"{path}: changed since it was indexed; run the index stage again")
    return _of_size(found, str(path), image)


def read_stored(store: RasterStore, image: Image) -> Raster:
    """The image's saliency map from the user's raster store.

    Raises:
        PipelineError: it is not of the image's size.
    """
    return _of_size(store.get(image.id), f"{store.path}: image {image.id}", image)


def _of_size(found: Raster, name: str, image: Image) -> Raster:
    height, width = found.shape
    if (height, width) != (image.height, image.width):
        raise PipelineError(
            f"{name}: is {width}x{height}, its image {image.width}x{image.height}; resize the saliency map to its image"
        )
    return found


def detector(kind: str) -> Any:
    """The OpenCV detector of this kind.

    Raises:
        PipelineError: this OpenCV comes without its saliency module.
    """
    if not hasattr(cv2, "saliency"):
        raise PipelineError(
            f"saliency.kind: {kind} needs OpenCV's saliency module, which this cv2 {cv2.__version__} lacks; "
            "pip uninstall opencv-python-headless, then pip install opencv-contrib-python-headless"
        )
    return getattr(cv2.saliency, DETECTORS[kind])()


def detect(image: NDArray[np.uint8], kind: str) -> Raster:
    """Saliency of an RGB image, H x W uint8, stretched over 0..255; all 0 where nothing stands out.

    Both detectors answer to edges and small contrasts. A wide Gaussian joins these into regions; it counts what lies
    outside the image as not salient, since photographers seldom let the frame cut their subject.
    """
    worked, raw = detector(kind).computeSaliency(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not worked:
        raise ValueError(f"OpenCV's {kind} detector refused an image of {image.shape}")
    sigma = SMOOTHING * min(image.shape[:2])
    smooth = np.asarray(cv2.GaussianBlur(raw.astype(np.float32), (0, 0), sigma, borderType=cv2.BORDER_CONSTANT))
    low, high = float(smooth.min()), float(smooth.max())
    if high - low < 1e-6:
        return np.zeros(smooth.shape, np.uint8)
    return np.rint((smooth - low) * (255 / (high - low))).astype(np.uint8)
