"""Strict decoding of images, masks and saliency maps: truncated, damaged or wrong files are refused.

OpenCV silently fills the missing part of a truncated JPEG with grey and converts palette indices to colours. Files are
therefore parsed up to their end marker first, and Pillow decodes masks and maps.
"""

import re
import zlib
from io import BytesIO
from typing import Any

import cv2
import numpy as np
from PIL import Image as Pillow

from pipeline.data.images import read_indexed
from pipeline.data.index import Image
from pipeline.stores.raster import Raster

IGNORE = 255
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
# Entropy-coded data holds 0xff only before 0x00 or a restart marker (T.81 B.1.1.5), so the next marker ends it.
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
_END_OF_IMAGE = 0xD9
_WITHOUT_LENGTH = (0x01, 0xD8)


class InvalidFile(ValueError):
    """A file is unusable; the message gives the fault and the fix, without the file name."""


def image_size(data: bytes) -> tuple[int, int]:
    """Decode a complete JPEG or PNG as training does and return its (height, width).

    Raises:
        InvalidFile: the file is truncated, damaged, or of another format.
    """
    if data.startswith(_JPEG):
        _check_jpeg(data)
    else:
        _check_png(data, "neither JPEG nor PNG; convert it")
    try:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # more pixels than OpenCV accepts
        decoded = None
    if decoded is None:
        raise InvalidFile("cannot be decoded; copy or download it again")
    return decoded.shape[0], decoded.shape[1]


def mask_values(data: bytes) -> Raster:
    """Decode the H x W class ids of a mask: indices of a palette PNG or values of a grey PNG.

    Raises:
        InvalidFile: the file is not a complete 8-bit palette or grey PNG.
    """
    return _grey(data, ("P", "L"), "a palette or grey PNG of class ids")


def saliency_values(data: bytes) -> Raster:
    """Decode an H x W saliency map, value / 255.

    Raises:
        InvalidFile: the file is not a complete grey 8-bit PNG.
    """
    return _grey(data, ("L",), "a grey 8-bit PNG")


def read_mask(image: Image) -> Raster:
    """Read the H x W class ids of an image's mask after comparing the file with its indexed hash.

    Raises:
        PipelineError: the file is missing or has changed since it was indexed.
        ValueError: the image has no mask.
    """
    if image.mask is None:
        raise ValueError(f"image {image.id} has no mask")
    return mask_values(read_indexed(image.mask, image.mask_sha256))


def _grey(data: bytes, modes: tuple[str, ...], wanted: str) -> Raster:
    _check_png(data, f"not a PNG; save it as {wanted}")
    try:
        with Pillow.open(BytesIO(data), formats=("PNG",)) as picture:
            if picture.mode not in modes:
                raise InvalidFile(f"its pixels are {_MODES.get(picture.mode, picture.mode)}; save it as {wanted}")
            return np.asarray(picture, np.uint8)
    except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:
        if isinstance(error, InvalidFile):
            raise
        raise InvalidFile(f"cannot be decoded ({error}); copy or download it again") from None


_MODES: dict[str, str] = {
    "RGB": "RGB colours",
    "RGBA": "RGBA colours",
    "P": "palette indices",
    "1": "1-bit",
    "I;16": "16-bit",
    "LA": "grey with alpha",
}


def _check_jpeg(data: bytes) -> None:
    """Walk the segments up to the end marker; trailing bytes are allowed, since some cameras write them."""
    at = len(_JPEG)
    while marker := _MARKER.search(data, at):
        code, at = marker[1][0], marker.end()
        if code == _END_OF_IMAGE:
            return
        if code not in _WITHOUT_LENGTH:
            at += int.from_bytes(data[at : at + 2])
    raise InvalidFile("truncated JPEG; copy or download it again")


def _check_png(data: bytes, not_png: str) -> None:
    """Walk the chunks up to IEND and verify every checksum."""
    if not data.startswith(_PNG):
        raise InvalidFile(not_png)
    view: Any = memoryview(data)
    at = len(_PNG)
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(view[at : at + 4])
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4]):
            break
        if view[at + 4 : at + 8] == b"IEND":
            return
        at = end + 4
    raise InvalidFile("truncated or damaged PNG; copy or download it again")
