"""Photos, maps and label maps as small pictures that are embedded in the page."""

import base64
from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.images import read_rgb
from pipeline.data.index import Image

Pixels = NDArray[np.uint8]
LONG_SIDE = 264  # pixels; the page shows pictures at half this size, so they are sharp on high-density screens


def palette() -> Pixels:
    """(256, 3) RGB: PASCAL VOC's colour map, which spreads the bits of class ids over the channels; 255 is cream."""
    ids = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((ids >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    colours[255] = (224, 224, 192)
    return colours


PALETTE = palette()


def read_photo(image: Image) -> Pixels:
    """Read an image as (height, width, 3) RGB, resized to a long side of ``LONG_SIDE`` pixels.

    Raises:
        PipelineError: the file differs from the one that was indexed.
    """
    rgb = read_rgb(image)
    factor = LONG_SIDE / max(rgb.shape[:2])
    size = max(1, round(rgb.shape[1] * factor)), max(1, round(rgb.shape[0] * factor))
    filtered = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
    return np.asarray(filtered, np.uint8)


def overlay(photo: Pixels, maps: Mapping[int, Pixels]) -> Pixels:
    """Blend the pixelwise maximum of the maps over the photo as a heat map.

    A contour in the colour of each class encloses the region where its map is at least half of its maximum.
    """
    height, width = photo.shape[:2]
    values = {
        class_id: cv2.resize(raster.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        for class_id, raster in maps.items()
    }
    strongest = np.max([np.zeros((height, width), np.float32), *values.values()], axis=0)
    share = (0.25 + 0.5 * strongest / 255)[..., None]
    warm = _inferno(strongest.round().astype(np.uint8))
    out = np.ascontiguousarray((photo * (1 - share) + warm * share).round().astype(np.uint8))
    for class_id, raster in values.items():
        half = (raster >= raster.max() / 2) & (raster > 0)
        outlines, _ = cv2.findContours(half.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(out, outlines, -1, (255, 255, 255), 5, cv2.LINE_AA)
        cv2.drawContours(out, outlines, -1, PALETTE[class_id].tolist(), 2, cv2.LINE_AA)
    return out


def heat(raster: Pixels, size: tuple[int, int]) -> Pixels:
    """Draw a map as an RGB heat map of ``size`` (height, width), dark at 0 and bright at 255."""
    interpolation = cv2.INTER_AREA if size[0] < raster.shape[0] else cv2.INTER_LINEAR
    return _inferno(np.asarray(cv2.resize(raster, size[::-1], interpolation=interpolation), np.uint8))


def _inferno(levels: Pixels) -> Pixels:
    return np.asarray(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1], np.uint8)


def grey(raster: Pixels) -> Pixels:
    """Draw a saliency map (height, width) as RGB, with a long side of at most ``LONG_SIDE``."""
    return np.repeat(_shrunk(raster, cv2.INTER_AREA)[..., None], 3, axis=2)


def colours(labels: Pixels) -> Pixels:
    """Draw a label map (height, width) as RGB in the palette's colours, with a long side of at most ``LONG_SIDE``."""
    return PALETTE[_shrunk(labels, cv2.INTER_NEAREST)]


def _shrunk(raster: Pixels, interpolation: int) -> Pixels:
    factor = LONG_SIDE / max(raster.shape)
    if factor >= 1:
        return raster
    size = max(1, round(raster.shape[1] * factor)), max(1, round(raster.shape[0] * factor))
    return np.asarray(cv2.resize(raster, size, interpolation=interpolation), np.uint8)


def data_uri(rgb: Pixels, lossless: bool) -> str:
    """Encode a picture as a data URI: PNG if ``lossless``, else JPEG."""
    kind, options = ("png", []) if lossless else ("jpeg", [cv2.IMWRITE_JPEG_QUALITY, 85])
    done, encoded = cv2.imencode(f".{kind}", np.ascontiguousarray(rgb[..., ::-1]), options)
    if not done:
        raise RuntimeError(f"cannot encode a picture of shape {rgb.shape} as {kind}")
    return f"data:image/{kind};base64,{base64.b64encode(encoded.tobytes()).decode()}"
