"""Reading image files in full: nothing truncated, damaged or of the wrong kind passes as an image, mask or map.

OpenCV fills what a truncated JPEG lacks with grey and says nothing, and turns a palette's indices into colours; hence
the walk to the end marker, and Pillow for the masks.
"""

import hashlib
import re
import zlib
from io import BytesIO
from typing import Any

import cv2
import numpy as np
from PIL import Image as Pillow

from pipeline.data.index import Image
from pipeline.errors import PipelineError
from pipeline.stores.raster import Raster

IGNORE = 255
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
# Entropy-coded data holds 0xff only before 0x00 or a restart marker (T.81 B.1.1.5), so the next marker ends it.
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
_END_OF_IMAGE = 0xD9
_WITHOUT_LENGTH = (0x01, 0xD8)


class InvalidFile(ValueError):
    """What is wrong with a file, and the mend, without the file's name."""


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width of a whole JPEG or PNG, decoded as training will decode it.

    Raises:
        InvalidFile: truncated, damaged, or another kind of file.
    """
    if data.startswith(_JPEG):
        _check_jpeg(data)
    else:
        _check_png(data, "neither JPEG nor PNG; convert it")
    try:
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # more pixels than OpenCV takes
        found = None
    if found is None:
        raise InvalidFile("cannot be decoded; copy or download it again")
    return found.shape[0], found.shape[1]


def mask_values(data: bytes) -> Raster:
    """H x W class ids of a mask: the indices of a palette PNG or the values of a grey one.

    Raises:
        InvalidFile: no whole PNG of 8-bit indices.
    """
    return _grey(data, ("P", "L"), "a palette or grey PNG of class ids")


def saliency_values(data: bytes) -> Raster:
    """H x W saliency, value / 255.

    Raises:
        InvalidFile: no whole grey 8-bit PNG.
    """
    return _grey(data, ("L",), "a grey 8-bit PNG")


def read_mask(image: Image) -> Raster:
    """H x W class ids of an indexed mask, whose bytes must be the indexed ones.

    Raises:
        PipelineError: the file is gone or has changed since it was indexed.
        ValueError: the image has no mask.
    """
    if image.mask is None:
        raise ValueError(f"image {image.id} has no mask")
    try:
        data = image.mask.read_bytes()
    except OSError as error:
        raise PipelineError(f"{image.mask}: cannot be read ({error.strerror}); run the index stage again") from None
    found = hashlib.sha256(data).hexdigest()
    if found != image.mask_sha256:
        raise PipelineError(
            f"{image.mask}: changed since it was indexed: sha256 is {found}, the index says {image.mask_sha256}; "
            "run the index stage again"
        )
    return mask_values(data)


def _grey(data: bytes, modes: tuple[str, ...], wanted: str) -> Raster:
    _check_png(data, f"no PNG; save it as {wanted}")
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
    "P": "indices of a palette",
    "1": "bits",
    "I;16": "of 16 bits",
    "LA": "grey with alpha",
}


def _check_jpeg(data: bytes) -> None:
    """Walk from segment to segment to the end marker; bytes may follow it, as some cameras write them."""
    at = len(_JPEG)
    while marker := _MARKER.search(data, at):
        code, at = marker[1][0], marker.end()
        if code == _END_OF_IMAGE:
            return
        if code not in _WITHOUT_LENGTH:
            at += int.from_bytes(data[at : at + 2])
    raise InvalidFile("truncated JPEG; copy or download it again")


def _check_png(data: bytes, otherwise: str) -> None:
    """Walk from chunk to chunk to IEND, with every checksum."""
    if not data.startswith(_PNG):
        raise InvalidFile(otherwise)
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
