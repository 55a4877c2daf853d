"""Strict decoding of masks and saliency maps: truncated, damaged, lossy or wrong files are refused."""

from typing import Any

import cv2
import numpy as np

from pipeline.data import photos
from pipeline.data.complete import PNG, InvalidFile, check_png
from pipeline.data.images import read_indexed, reduced
from pipeline.data.index import Image
from pipeline.stores.raster import Raster

IGNORE = 255
LOSSLESS = (".png", ".tif", ".tiff", ".bmp", ".gif")  # files of masks and maps
LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
_LOSSLESS_FORMATS = ("PNG", "TIFF", "BMP", "GIF")


def mask_values(data: bytes, limit: int) -> Raster:
    """Decode the H x W class ids of a mask: indices of a palette or grey values, in a lossless format.

    Raises:
        InvalidFile: the file is not a complete 8-bit palette or grey picture of at most ``limit`` pixels.
    """
    return _grey(data, limit, ("P", "L"), "a palette or grey PNG of class ids")


def saliency_values(data: bytes, limit: int) -> Raster:
    """Decode an H x W saliency map, value / 255, in a lossless format.

    Raises:
        InvalidFile: the file is not a complete grey 8-bit picture of at most ``limit`` pixels.
    """
    return _grey(data, limit, ("L",), "a grey 8-bit PNG")


def read_mask(image: Image) -> Raster:
    """Read the H x W class ids of an image's mask, at its working size, after comparing the file with its hash.

    Raises:
        PipelineError: the file is missing or has changed since it was indexed.
        ValueError: the image has no mask.
    """
    if image.mask is None:
        raise ValueError(f"image {image.id} has no mask")
    values = mask_values(read_indexed(image.mask, image.mask_sha256), image.file_pixels)
    return reduced(values, image, cv2.INTER_NEAREST_EXACT)


def _grey(data: bytes, limit: int, modes: tuple[str, ...], wanted: str) -> Raster:
    if data.startswith(PNG):
        check_png(data, limit)
        if data[24:25] == b"\x10":
            raise InvalidFile("is a 16-bit PNG, but 8 bits are read; scale its values and save it with 8 bits")
    with photos.opened(data, limit) as picture:
        compression = str(picture.info.get("compression", ""))
        if picture.format not in _LOSSLESS_FORMATS or "jpeg" in compression or "webp" in compression:
            form = f"{picture.format}{f' with {compression} compression' if picture.format == 'TIFF' else ''}"
            raise InvalidFile(f"is {form}, whose lossy compression changes values; save it as {wanted}")
        if picture.mode not in modes:
            raise InvalidFile(f"its pixels are {_MODES.get(picture.mode, picture.mode)}; save it as {wanted}")
        picture.load()
        pixels = np.asarray(picture, np.uint8)
        # Pillow turns TIFF itself
        return photos.upright(pixels, 1 if picture.format == "TIFF" else photos.orientation_of(picture))


_MODES: dict[str, Any] = {
    "RGB": "RGB colours",
    "RGBA": "RGBA colours",
    "P": "palette indices",
    "1": "1-bit",
    "LA": "grey with alpha",
    "I;16": "16-bit",
}
