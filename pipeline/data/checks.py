"""Strict decoding of images, masks and saliency maps: truncated, damaged or wrong files are refused.

OpenCV silently fills the missing part of a truncated JPEG with grey and converts palette indices to colours. Files are
therefore parsed up to their end marker first, and Pillow decodes masks and maps. A PNG of 100 kB can claim a billion
pixels, so the size in the header is compared with a limit before anything is decoded.
"""

import re
import zlib
from io import BytesIO
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from pipeline.data.images import read_indexed, reduced
from pipeline.data.index import Image
from pipeline.stores.raster import Raster

IGNORE = 255
MEGAPIXEL = 1_000_000
Pillow.MAX_IMAGE_PIXELS = None  # the limit of this module holds instead
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
# Entropy-coded data holds 0xff only before 0x00 or a restart marker (T.81 B.1.1.5), so the next marker ends it.
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
_END_OF_IMAGE = 0xD9
_WITHOUT_LENGTH = (0x01, 0xD8)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF markers (T.81 Table B.1); the rest define tables
_ARITHMETIC = {*range(0xC9, 0xD0)} - {0xCC}
_START_OF_SCAN = 0xDA
_METADATA = {*range(0xE0, 0xF0), 0xFE}  # APPn and COM
_SURPLUS = b"\xfb\xfe\xef" * 22  # entropy-coded data that no image needs, in long codes, so that it lasts few blocks
# The same after each restart marker, too, so that the decoder reads it wherever it lacks a part of a scan.
_SURPLUS_SCAN = _SURPLUS + b"".join(bytes([0xFF, 0xD0 + number]) + _SURPLUS for number in range(8))
_LOOKAHEAD = 8  # bytes that libjpeg reads ahead


class InvalidFile(ValueError):
    """A file is unusable; the message gives the fault and the fix, without the file name."""


def image_size(data: bytes, limit: int) -> tuple[int, int]:
    """Decode a complete JPEG or PNG and return its (height, width); see ``image_pixels``."""
    height, width = image_pixels(data, limit).shape[:2]
    return height, width


def image_pixels(data: bytes, limit: int) -> NDArray[np.uint8]:
    """Decode a complete JPEG or PNG as training does, to H x W x 3 uint8, BGR.

    Args:
        limit: number of pixels above which a file is refused from its header alone.

    Raises:
        InvalidFile: the file is truncated, damaged, too large, or of another format.
    """
    if data.startswith(_JPEG):
        _check_jpeg(data, limit)
    else:
        _check_png(data, limit, "neither JPEG nor PNG; convert it")
    try:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # more pixels than OpenCV accepts
        decoded = None
    if decoded is None:
        raise InvalidFile("cannot be decoded; copy or download it again")
    return np.asarray(decoded, np.uint8)


def mask_values(data: bytes, limit: int) -> Raster:
    """Decode the H x W class ids of a mask: indices of a palette PNG or values of a grey PNG.

    Raises:
        InvalidFile: the file is not a complete 8-bit palette or grey PNG of at most ``limit`` pixels.
    """
    return _grey(data, limit, ("P", "L"), "a palette or grey PNG of class ids")


def saliency_values(data: bytes, limit: int) -> Raster:
    """Decode an H x W saliency map, value / 255.

    Raises:
        InvalidFile: the file is not a complete grey 8-bit PNG of at most ``limit`` pixels.
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
    _check_png(data, limit, f"not a PNG; save it as {wanted}")
    try:
        with Pillow.open(BytesIO(data), formats=("PNG",)) as picture:
            if picture.mode not in modes:
                raise InvalidFile(f"its pixels are {_MODES.get(picture.mode, picture.mode)}; save it as {wanted}")
            return np.asarray(picture, np.uint8)
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, InvalidFile):
            raise
        raise InvalidFile(f"cannot be decoded ({error}); copy or download it again") from None


_MODES: dict[str, str] = {
    "RGB": "RGB colours",
    "RGBA": "RGBA colours",
    "P": "palette indices",
    "1": "1-bit",
    "LA": "grey with alpha",
}


def _check_size(width: int, height: int, limit: int) -> None:
    if width * height > limit:
        size = f"{width * height / MEGAPIXEL:.4g} megapixels ({width}x{height})"
        most = f"{limit / MEGAPIXEL:.4g}"
        raise InvalidFile(f"has {size}, but at most {most} are read; scale it down or raise dataset.max_megapixels")


def _check_jpeg(data: bytes, limit: int) -> None:
    """Check the size, the end marker and the completeness of the scans; trailing bytes are allowed (some cameras)."""
    at, scans, arithmetic = len(_JPEG), 0, False
    coded = [_JPEG]  # the file up to its end marker, without metadata
    lacking: set[tuple[int, int]] = set()  # (component, coefficient) whose last bit is in none of the scans so far
    while marker := _MARKER.search(data, at):
        code, end = marker[1][0], marker.end()
        coded.append(data[at : marker.start()])
        if code == _END_OF_IMAGE:
            # Arithmetic coding omits zeros at the end of a scan, so such a scan may end before its image does.
            if lacking or (not arithmetic and _is_cut(b"".join(coded).rstrip(b"\xff"), scans)):
                raise InvalidFile("truncated JPEG, despite its end marker; copy or download it again")
            return
        if code not in _WITHOUT_LENGTH:
            end += int.from_bytes(data[end : end + 2])
        segment = data[marker.end() : end]
        if code in _FRAMES and len(segment) >= 8:
            _check_size(int.from_bytes(segment[5:7]), int.from_bytes(segment[3:5]), limit)
            arithmetic = code in _ARITHMETIC
            lacking = {(component, number) for component in segment[8::3] for number in range(64)}
        elif code == _START_OF_SCAN and len(segment) >= 6:
            scans += 1
            first, last, bits = segment[-3:]
            if bits & 15 == 0:
                lacking -= {(component, n) for component in segment[3:-3:2] for n in range(first, last + 1)}
        if code not in _METADATA:
            coded.append(data[marker.start() : end])
        at = end
    raise InvalidFile("truncated JPEG; copy or download it again")


def _is_cut(coded: bytes, scans: int) -> bool:
    """Whether the scans of a JPEG, given without its end marker, end before the image does.

    A decoder fills the missing part with grey. With one scan, Pillow reports that it ran out of data, since there is no
    end marker; an eighth of the size suffices. Several scans (progressive JPEG) need the end marker: they are decoded
    with and without surplus data, which changes the pixels only where data were missing.
    """
    if scans == 1:
        return isinstance(_pixels(coded + _SURPLUS[:_LOOKAHEAD], reduced=True), _Cut)
    end = bytes([0xFF, _END_OF_IMAGE])
    return _pixels(coded + end) != _pixels(coded + _SURPLUS_SCAN + end)


class _Cut:
    """Result of a decoder that ran out of data."""


def _pixels(data: bytes, reduced: bool = False) -> int | _Cut | None:
    """Checksum of a JPEG's pixels; None if Pillow cannot decode it."""
    try:
        with Pillow.open(BytesIO(data), formats=("JPEG",)) as picture:
            if reduced:
                picture.draft("L", (1, 1))
            return zlib.crc32(picture.tobytes())
    except (OSError, SyntaxError, ValueError) as error:
        return _Cut() if "truncated" in str(error) else None


def _check_png(data: bytes, limit: int, not_png: str) -> None:
    """Compare the header's size with the limit, then walk the chunks up to IEND and verify every checksum."""
    if not data.startswith(_PNG):
        raise InvalidFile(not_png)
    view: Any = memoryview(data)
    if view[12:16] == b"IHDR" and len(data) > 24:
        _check_size(int.from_bytes(view[16:20]), int.from_bytes(view[20:24]), limit)
        if view[24] == 16:
            raise InvalidFile("is a 16-bit PNG, but 8 bits are read; scale its values and save it with 8 bits")
    at = len(_PNG)
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(view[at : at + 4])
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4]):
            break
        if view[at + 4 : at + 8] == b"IEND":
            return
        at = end + 4
    raise InvalidFile("truncated or damaged PNG; copy or download it again")
