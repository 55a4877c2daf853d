"""Checks that JPEG and PNG files are complete, before they are decoded.

Decoders silently fill the missing part of a truncated JPEG with grey. Files are therefore parsed up to their end marker
first. A PNG of 100 kB can claim a billion pixels, so the size in the header is compared with a limit before anything is
decoded.
"""

import re
import zlib
from io import BytesIO
from typing import Any

from PIL import Image as Pillow

MEGAPIXEL = 1_000_000
Pillow.MAX_IMAGE_PIXELS = None  # the limits of this module hold instead
PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8"
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


class TooLarge(InvalidFile):
    """A file has too many pixels."""


def check_size(width: int, height: int, limit: int) -> None:
    """Compare the size in a header with a limit.

    Raises:
        TooLarge: the image has more than ``limit`` pixels.
    """
    if width * height > limit:
        size = f"{width * height / MEGAPIXEL:.4g} megapixels ({width}x{height})"
        raise TooLarge(f"has {size}, but at most {limit / MEGAPIXEL:.4g} are read; scale it down")


def check_png(data: bytes, limit: int) -> None:
    """Compare the header's size with the limit, then walk the chunks up to IEND and verify every checksum.

    Raises:
        InvalidFile: the PNG is truncated or damaged, or has more than ``limit`` pixels.
    """
    view: Any = memoryview(data)
    if view[12:16] == b"IHDR" and len(data) > 24:
        check_size(int.from_bytes(view[16:20]), int.from_bytes(view[20:24]), limit)
    at = len(PNG)
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(view[at : at + 4])
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4]):
            break
        if view[at + 4 : at + 8] == b"IEND":
            return
        at = end + 4
    raise InvalidFile("truncated or damaged PNG; copy or download it again")


def check_jpeg(data: bytes, limit: int) -> None:
    """Check the size, the end marker and the completeness of the scans; trailing bytes are allowed (some cameras).

    Raises:
        InvalidFile: the JPEG is truncated or has more than ``limit`` pixels.
    """
    at, scans, arithmetic = len(JPEG), 0, False
    coded = [JPEG]  # the file up to its end marker, without metadata
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
            check_size(int.from_bytes(segment[5:7]), int.from_bytes(segment[3:5]), limit)
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
