"""Reading of indexed files without torch, so that label and saliency workers start quickly.

Every image, mask and saliency map that a stage after the index reads passes ``read_indexed``.
"""

import hashlib
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data import photos
from pipeline.data.complete import InvalidFile
from pipeline.data.index import Image
from pipeline.errors import PipelineError
from pipeline.stores.files import read_regular


def read_indexed(path: Path, sha256: str | None) -> bytes:
    """Read a file of the dataset after comparing it with its hash in the index, if that has one.

    Raises:
        PipelineError: the file cannot be read, or it has changed since it was indexed.
    """
    try:
        content = read_regular(path)
    except OSError as error:
        raise PipelineError(
            f"{path}: cannot be read ({error.strerror}); restore it, or run the index stage again"
        ) from None
    actual = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, actual):
        raise PipelineError(
            f"{path}: changed since it was indexed: sha256 is {actual}, the index says {sha256}; "
            "run the index stage again"
        )
    return content


def read_rgb(image: Image) -> NDArray[np.uint8]:
    """Read an image as H x W x 3 uint8 at its working size, upright (``pipeline.data.photos``).

    Raises:
        PipelineError: the file differs from the one that was indexed, or it cannot be decoded to the indexed size.
    """
    content = read_indexed(image.file, image.sha256)
    try:
        rgb = photos.decode(content, image.file_pixels)
    except InvalidFile as error:
        raise PipelineError(f"{image.file}: {error}; or run the index stage again if it was replaced") from None
    if rgb.shape[:2] != (image.file_size or image.size):
        raise PipelineError(f"{image.file}: differs from the indexed image; run the index stage again")
    if image.file_size:
        rgb = cv2.resize(rgb, image.size[::-1], interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    return rgb


def reduced(raster: NDArray[np.uint8], image: Image, interpolation: int) -> NDArray[np.uint8]:
    """Reduce a mask or map of the size of the image's file to the working size; others are returned as they are."""
    if image.file_size is None or raster.shape != image.file_size:
        return raster
    return np.asarray(cv2.resize(raster, image.size[::-1], interpolation=interpolation), np.uint8)


def working_size(size: tuple[int, int], megapixels: float) -> tuple[int, int]:
    """The (height, width) of an image after its reduction to at most ``megapixels``."""
    height, width = size
    limit = round(megapixels * 1e6)
    if height * width <= limit:
        return size
    factor = (limit / (height * width)) ** 0.5
    short = max(1, int(min(size) * factor))
    long = min(int(max(size) * factor), limit // short)
    return (short, long) if height < width else (long, short)
