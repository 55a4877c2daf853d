"""The reader of photos as people have them: any common format, depth and colour model, upright as a viewer shows them.

``read`` returns H x W x 3 uint8 RGB, whatever the file holds:

* The EXIF orientation is applied, so a mask has the size and the sides of the photo on the screen.
* Transparent pixels are blended with white.
* Of several frames (GIF, TIFF, WebP, MPO), the first is read.
* 16-bit values are reduced to 8 bits. The bits in use are those of the largest value, at least 8; the top 8 of them
  are kept. Data of 12 bits in a 16-bit file are therefore as bright as those of an 8-bit file.
* CMYK and YCCK are converted without their colour profile.
"""

from io import BytesIO
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from pipeline.errors import PipelineError

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".heic", ".heif")
PIXELS = 80_000_000  # a larger photo is refused before it is decoded; Pillow warns from 89 megapixels on
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
_UNREADABLE = ("F", "I")  # values without a known range


def read(photo: Path | bytes, name: str | None = None) -> NDArray[np.uint8]:
    """Read a photo as H x W x 3 uint8 RGB, upright; see above.

    Args:
        photo: a file, or the bytes of one.
        name: the name of the photo in messages; by default, its path.

    Raises:
        PipelineError: the photo cannot be read, is damaged, or has more than ``PIXELS`` pixels.
    """
    name = name or (str(photo) if isinstance(photo, Path) else "photo")
    try:
        data = photo.read_bytes() if isinstance(photo, Path) else photo
    except OSError as error:
        raise PipelineError(f"{name}: cannot be read: {error.strerror}") from None
    try:
        with _open(BytesIO(data), data, name) as picture:
            width, height = picture.size
            if width * height > PIXELS:
                raise PipelineError(
                    f"{name}: has {width}x{height} pixels, more than {PIXELS // 1_000_000} million; scale it down"
                )
            if picture.mode in _UNREADABLE:
                raise PipelineError(
                    f"{name}: holds 32-bit values without a known range; save it with 8 or 16 bits a channel"
                )
            return _deep(picture, data, name) if _is_deep(picture) else _upright(picture)
    except UnidentifiedImageError:
        raise PipelineError(f"{name}: is not a photo of a known format; save it as JPEG or PNG") from None
    except Image.DecompressionBombError:
        raise PipelineError(f"{name}: has more than {PIXELS // 1_000_000} million pixels; scale it down") from None
    except (OSError, SyntaxError, ValueError, EOFError, cv2.error) as error:
        raise PipelineError(f"{name}: damaged ({' '.join(str(error).split())}); copy it again") from None


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
    return _upright(picture)


def _open(file: IO[bytes], data: bytes, name: str) -> Image.Image:
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF:
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise PipelineError(f"{name}: is HEIC; pip install 'wsss[photos]' to read it, or save it as JPEG") from None
        register_heif_opener()
    return Image.open(file)


def _upright(picture: Image.Image) -> NDArray[np.uint8]:
    picture.load()
    return _flat(picture if picture.format == "TIFF" else ImageOps.exif_transpose(picture))  # Pillow turns TIFF itself


def _flat(picture: Image.Image) -> NDArray[np.uint8]:
    """Blend transparent pixels with white and convert to RGB."""
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.new("RGBA", layer.size, "white")
        picture.alpha_composite(layer)
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"), np.uint8).copy()


def _is_deep(picture: Image.Image) -> bool:
    """Whether the file has 16 bits a channel. Pillow would drop the lower 8 of colours."""
    if picture.mode in _DEEP:
        return True
    tiles = picture.tile if isinstance(picture, ImageFile.ImageFile) else []
    return any(";16" in str(tile[3]) for tile in tiles)


def _deep(picture: Image.Image, data: bytes, name: str) -> NDArray[np.uint8]:
    picture.load()  # a PNG may have its orientation behind its pixels
    exif = {} if picture.format == "TIFF" else picture.getexif()  # OpenCV turns TIFF itself
    orientation = exif.get(ExifTags.Base.Orientation, 1)
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16:
        raise PipelineError(f"{name}: its 16-bit values cannot be decoded; save it with 8 bits a channel")
    if values.ndim == 3:
        values = values[..., [2, 1, 0, 3][: values.shape[2]]]
    turned = Image.fromarray(np.ascontiguousarray(_reduced(values)))
    turned.getexif()[ExifTags.Base.Orientation] = orientation
    return _flat(ImageOps.exif_transpose(turned))


def _reduced(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Reduce 16-bit to 8-bit values; alpha, if any, always has 16 bits."""
    colours = values[..., :3] if values.ndim == 3 else values
    bits = max(8, int(colours.max()).bit_length())
    reduced = (colours >> (bits - 8)).astype(np.uint8)
    if values.ndim == 3 and values.shape[2] == 4:
        reduced = np.dstack([reduced, (values[..., 3] >> 8).astype(np.uint8)])
    return reduced
