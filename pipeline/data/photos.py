"""The reader of photos as people have them: any common format, depth and colour model, upright as a viewer shows them.

It is the only one: of the index, of every stage, and of new photos. It returns H x W x 3 uint8 RGB:

* The EXIF orientation is applied, so a mask has the size and the sides of the photo on the screen.
* Transparent pixels are blended with white.
* Of several frames (GIF, TIFF, WebP, MPO), the first is read.
* 16-bit values are reduced to 8 bits. The bits in use are those of the largest value, at least 8; the top 8 of them
  are kept. Data of 12 bits in a 16-bit file are therefore as bright as those of an 8-bit file.
* CMYK and YCCK are converted without their colour profile.

OpenCV decodes plain 8-bit JPEG and PNG, since it is faster than Pillow; both return the same bytes.
"""

import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from pipeline.config.dataset import Dataset
from pipeline.data.complete import JPEG, PNG, InvalidFile, check_jpeg, check_png, check_size
from pipeline.errors import PipelineError
from pipeline.stores.files import read_regular

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".heic", ".heif")
# A larger photo is refused before it is decoded, unless the caller sets another limit.
PIXELS = round(Dataset.max_megapixels * 1e6)
# Formats that Pillow opens; others could start programs, such as Ghostscript for EPS
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
_STARTS = {JPEG: "JPEG", PNG: "PNG", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"GIF8": "GIF", b"RIFF": "WebP", b"BM": "BMP"}
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
_UNREADABLE = ("F", "I")  # values without a known range
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of a JPEG's frame header (T.81 Table B.1)
_APP1 = 0xE1  # EXIF or XMP
# Chunks of a PNG that need Pillow: orientation in EXIF or XMP, transparency, animation
_CHUNKS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"tRNS", b"acTL")
_TURNED = ("TIFF", "HEIF")  # formats that their decoders turn upright
warnings.filterwarnings("ignore", module=r"PIL\.")  # on damaged metadata, without the name of the file
Turn = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
_TURNS: dict[int, Turn] = {  # from the stored to the upright pixels, by EXIF orientation
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


class HeicSupport(InvalidFile):
    """The package that reads HEIC is missing."""


@dataclass(frozen=True)
class Photo:
    """A photo and what its file is.

    Attributes:
        rgb: H x W x 3 uint8, upright.
        form: Pillow's name of the format, such as JPEG.
        orientation: the EXIF orientation that was applied, 1..8.
        frames: number of pictures in the file, of which the first is read.
        deep: whether the file has 16 bits a channel.
    """

    rgb: NDArray[np.uint8]
    form: str
    orientation: int = 1
    frames: int = 1
    deep: bool = False

    @property
    def stored_size(self) -> tuple[int, int]:
        """The (height, width) before the orientation is applied."""
        height, width = self.rgb.shape[:2]
        return (width, height) if self.orientation > 4 else (height, width)


def read(photo: Path | bytes, name: str | None = None, limit: int = PIXELS) -> NDArray[np.uint8]:
    """Read a photo as H x W x 3 uint8 RGB, upright; see above.

    Args:
        photo: a file, or the bytes of one.
        name: the name of the photo in messages; by default, its path.
        limit: number of pixels above which a photo is refused from its header alone.

    Raises:
        PipelineError: the photo cannot be read, is truncated or damaged, or has more than ``limit`` pixels.
    """
    name = name or (str(photo) if isinstance(photo, Path) else "photo")
    try:
        return examine(read_regular(photo) if isinstance(photo, Path) else photo, limit).rgb
    except OSError as error:
        raise PipelineError(f"{name}: cannot be read: {error.strerror}") from None
    except InvalidFile as error:
        raise PipelineError(f"{name}: {error}") from None


def examine(data: bytes, limit: int = PIXELS) -> Photo:
    """Check that a file is complete, and decode it.

    Args:
        limit: number of pixels above which a file is refused from its header alone.

    Raises:
        InvalidFile: the file is truncated, damaged, too large, or no photo of a known format.
    """
    if data.startswith(JPEG):
        check_jpeg(data, limit)
    elif data.startswith(PNG):
        check_png(data, limit)
    return _decode(data, limit)


def decode(data: bytes, limit: int = PIXELS) -> NDArray[np.uint8]:
    """Decode a file that is known to be complete: H x W x 3 uint8 RGB, upright.

    Raises:
        InvalidFile: the file cannot be decoded, or it is too large.
    """
    return _decode(data, limit).rgb


def from_pixels(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Convert an array to H x W x 3 uint8 RGB: H x W grey, H x W x 3 RGB or H x W x 4 RGBA, of 8 or 16 bits.

    Raises:
        ValueError: the array has another shape or type.
    """
    deep = values.dtype == np.uint16
    shaped = values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (1, 3, 4))
    if not shaped or not (deep or values.dtype == np.uint8) or not values.size:
        raise ValueError(
            f"a photo is H x W, H x W x 3 (RGB) or H x W x 4 (RGBA), uint8 or uint16, not {values.shape} {values.dtype}"
        )
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    return _flat(Image.fromarray(np.ascontiguousarray(_reduced(values) if deep else values)))


def from_picture(picture: Image.Image) -> NDArray[np.uint8]:
    """Convert a Pillow image to H x W x 3 uint8 RGB, upright.

    Raises:
        ValueError: its values have no known range.
    """
    if picture.mode in _UNREADABLE:
        raise ValueError(f"a picture of mode {picture.mode} holds 32-bit values without a known range")
    if picture.mode in _DEEP:
        return from_pixels(np.asarray(ImageOps.exif_transpose(picture)).astype(np.uint16))
    picture.load()
    return _flat(picture if picture.format == "TIFF" else ImageOps.exif_transpose(picture))  # Pillow turns TIFF itself


@contextmanager
def opened(data: bytes, limit: int) -> Iterator[Image.Image]:
    """Open a file with Pillow, whose decoder's errors become InvalidFile.

    Raises:
        InvalidFile: see ``decode``.
    """
    form = next((name for start, name in _STARTS.items() if data.startswith(start)), "")
    try:
        formats: tuple[str, ...] = _FORMATS
        if data[4:8] == b"ftyp" and data[8:12] in _HEIF:
            form, formats = "HEIC", ("HEIF",)
            try:
                from pillow_heif import register_heif_opener
            except ImportError:
                raise HeicSupport("is HEIC; pip install 'wsss[photos]' to read it, or save it as JPEG") from None
            register_heif_opener()
        with Image.open(BytesIO(data), formats=formats) as picture:
            check_size(*picture.size, limit)
            yield picture
    except InvalidFile:
        raise
    except UnidentifiedImageError:
        if form:
            raise InvalidFile(f"damaged {form}, which cannot be decoded; copy it again") from None
        raise InvalidFile("is not a photo of a known format; save it as JPEG or PNG") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        KeyError,
        TypeError,
        OverflowError,
        struct.error,
        cv2.error,
    ) as error:
        cause = " ".join(str(error).split())[:200]
        raise InvalidFile(f"damaged ({cause}); copy it again") from None


def orientation_of(picture: Image.Image) -> int:
    """The EXIF orientation of a picture, 1..8; 1 if it is missing or damaged."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's parser raises what the damage leads to; viewers ignore damaged EXIF data
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Apply an EXIF orientation to H x W or H x W x C stored pixels."""
    return pixels if orientation == 1 else np.ascontiguousarray(_TURNS[orientation](pixels))


def _decode(data: bytes, limit: int) -> Photo:
    if (form := _plain(data)) and (rgb := _by_opencv(data)) is not None:
        return Photo(rgb, form)
    with opened(data, limit) as picture:
        if picture.mode in _UNREADABLE:
            raise InvalidFile("holds 32-bit values without a known range; save it with 8 or 16 bits a channel")
        tiles = picture.tile if isinstance(picture, ImageFile.ImageFile) else []
        form, frames = str(picture.format), int(getattr(picture, "n_frames", 1))
        if form == "MPO":  # a JPEG with previews or the second picture of a stereo camera
            form, frames = "JPEG", 1
        orientation = int(picture.info.get("original_orientation") or orientation_of(picture))  # HEIC's own key
        if form == "JPEG" and picture.mode in ("RGB", "L") and (rgb := _by_opencv(data)) is not None:
            return Photo(upright(rgb, orientation), form, orientation)
        picture.load()
        if form == "PNG":
            orientation = orientation_of(picture)  # it may lie behind the pixels
        if deep := _is_deep(picture, tiles):
            picture = Image.fromarray(_deep(data))
        pixels = _flat(picture)
        return Photo(pixels if form in _TURNED else upright(pixels, orientation), form, orientation, frames, deep)


def _plain(data: bytes) -> str:
    """'JPEG' or 'PNG' if a file is 8-bit grey or RGB of this format, without transparency, EXIF and XMP; else ''.

    Only headers are parsed, so that this costs microseconds.
    """
    if data.startswith(PNG):
        return "PNG" if _is_plain_png(data) else ""
    at = len(JPEG)
    while data.startswith(JPEG) and at + 10 <= len(data) and data[at] == 0xFF:
        code = data[at + 1]
        if code in _FRAMES:
            return "JPEG" if data[at + 4] == 8 and data[at + 9] in (1, 3) else ""
        if code == _APP1:
            return ""
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return ""


def _is_plain_png(data: bytes) -> bool:
    at = len(PNG)
    depth, colour = data[24:26] if len(data) > 26 else (0, 0)
    while at + 12 <= len(data) and data[at + 4 : at + 8] not in _CHUNKS:
        at += 12 + int.from_bytes(data[at : at + 4])
    return depth == 8 and colour in (0, 2, 3) and at >= len(data)


def _by_opencv(data: bytes) -> NDArray[np.uint8] | None:
    """Decode 8-bit JPEG or PNG as stored; None if OpenCV cannot."""
    try:
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # more pixels than OpenCV accepts
        return None
    return None if bgr is None else cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)


def _flat(picture: Image.Image) -> NDArray[np.uint8]:
    """Blend transparent pixels with white and convert to RGB."""
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.new("RGBA", layer.size, "white")
        picture.alpha_composite(layer)
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"), np.uint8).copy()


def _is_deep(picture: Image.Image, tiles: Sequence[Any]) -> bool:
    """Whether the file has 16 bits a channel. Pillow would drop the lower 8 of colours.

    Args:
        tiles: ``picture.tile`` before the pixels were loaded.
    """
    return picture.mode in _DEEP or any(";16" in str(tile[3]) for tile in tiles)


def _deep(data: bytes) -> NDArray[np.uint8]:
    """Decode a file of 16 bits a channel as stored (TIFF upright, by OpenCV): 8-bit grey, RGB or RGBA."""
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16:
        raise InvalidFile("its 16-bit values cannot be decoded; save it with 8 bits a channel")
    if values.ndim == 3:
        values = values[..., [2, 1, 0, 3][: values.shape[2]]]
    return _reduced(values)


def _reduced(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Reduce 16-bit to 8-bit values; alpha, if any, always has 16 bits."""
    colours = values[..., :3] if values.ndim == 3 else values
    bits = max(8, int(colours.max()).bit_length())
    reduced = (colours >> (bits - 8)).astype(np.uint8)
    if values.ndim == 3 and values.shape[2] == 4:
        reduced = np.dstack([reduced, (values[..., 3] >> 8).astype(np.uint8)])
    return np.ascontiguousarray(reduced)
