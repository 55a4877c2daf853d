"""Saliency maps: user-supplied files or stores, U2-Net, and two OpenCV detectors that need no weights."""

from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.checks import saliency_values
from pipeline.data.complete import InvalidFile
from pipeline.data.images import read_indexed, reduced
from pipeline.data.index import Image
from pipeline.errors import PipelineError
from pipeline.stores.raster import Raster, RasterStore

DETECTORS = {
    "spectral_residual": "StaticSaliencySpectralResidual_create",  # Hou and Zhang, CVPR 2007
    "fine_grained": "StaticSaliencyFineGrained_create",  # Montabone and Soto, IVC 2010
}
SMOOTHING = 0.1  # sigma of the Gaussian as a fraction of the short side of the image


def read_file(image: Image) -> Raster:
    """Read the image's indexed saliency PNG: H x W uint8, value / 255.

    Raises:
        PipelineError: the file is missing, changed since it was indexed, not 8-bit grey, or not of the image's size.
        ValueError: the index has no saliency map of the image.
    """
    path = image.saliency
    if path is None:
        raise ValueError(f"image {image.id} has no saliency map")
    try:
        raster = saliency_values(read_indexed(path, image.saliency_sha256), image.file_pixels)
    except InvalidFile as error:
        raise PipelineError(f"{path}: {error}") from None
    _check_size(raster.shape, str(path), image)
    return reduced(raster, image, cv2.INTER_AREA)


def read_stored(store: RasterStore, image: Image) -> Raster:
    """Read the image's saliency map from a user-supplied raster store: H x W uint8, value / 255.

    Raises:
        PipelineError: the map does not have the image's size.
    """
    _check_size(store.shape(image.id), f"{store.path}: image {image.id}", image)
    return reduced(store.get(image.id), image, cv2.INTER_AREA)


def _check_size(shape: tuple[int, ...], name: str, image: Image) -> None:
    height, width = shape
    if (height, width) not in (image.size, image.file_size):
        wanted = image.file_size or image.size
        raise PipelineError(
            f"{name}: is {width}x{height}, but its image is {wanted[1]}x{wanted[0]}; resize the saliency map"
        )


def detector(kind: str) -> Any:
    """Create the OpenCV detector ``kind``.

    Raises:
        PipelineError: the installed OpenCV has no saliency module.
    """
    if not hasattr(cv2, "saliency"):
        raise PipelineError(
            f"saliency.kind: {kind} needs OpenCV's saliency module, which this cv2 {cv2.__version__} lacks; "
            "pip uninstall opencv-python-headless, then pip install opencv-contrib-python-headless"
        )
    return getattr(cv2.saliency, DETECTORS[kind])()


def detect(image: NDArray[np.uint8], kind: str) -> Raster:
    """Detect saliency in an H x W x 3 RGB image: H x W uint8, stretched to 0..255; all 0 if nothing stands out.

    Both detectors respond to edges and small contrasts. A wide Gaussian merges these into regions. It treats the area
    outside the image as not salient, since photographers seldom let the frame cut their subject.

    Raises:
        ValueError: the detector cannot process the image.
    """
    success, raw = detector(kind).computeSaliency(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not success:
        raise ValueError(f"OpenCV's {kind} detector cannot process an image of {image.shape}")
    sigma = SMOOTHING * min(image.shape[:2])
    smooth = np.asarray(cv2.GaussianBlur(raw.astype(np.float32), (0, 0), sigma, borderType=cv2.BORDER_CONSTANT))
    low, high = float(smooth.min()), float(smooth.max())
    if high - low < 1e-6:
        return np.zeros(smooth.shape, np.uint8)
    return np.rint((smooth - low) * (255 / (high - low))).astype(np.uint8)


@cache
def u2net() -> Any:
    """Load U2-Net, once in each process.

    Raises:
        PipelineError: the package rembg is not installed, or its network cannot be loaded or downloaded.
    """
    try:
        from rembg import new_session
    except ImportError:
        raise PipelineError(
            "saliency.kind: rembg is not installed; pip install 'rembg[cpu]', or choose another kind"
        ) from None
    try:
        return new_session("u2net")
    except Exception as error:  # no network, or a damaged file
        reason = " ".join(str(error).split())
        raise PipelineError(
            f"saliency.kind: rembg cannot load u2net.onnx ({reason}); download the file to ~/.u2net"
        ) from error


def salient_objects(image: NDArray[np.uint8]) -> Raster:
    """U2-Net's map of what stands out in an H x W x 3 RGB image: H x W uint8, value / 255.

    Raises:
        PipelineError: see ``u2net``.
    """
    from PIL import Image as Picture
    from rembg import remove

    mask = remove(Picture.fromarray(image), session=u2net(), only_mask=True)
    return np.asarray(mask.convert("L"), np.uint8)
