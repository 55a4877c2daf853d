"""``overlay``: overlays/PHOTO.jpg, the photo with each class tinted, outlined and named."""

from functools import cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.stores.files import atomic
from wsss.formats.base import Item
from wsss.formats.colours import colour

TINT = 0.35  # share of the class's colour inside its outline
# Tried in this order for a name; the last resort is Pillow's own font, which has Latin letters only.
FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "Arial.ttf",
    "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc",
    "msyh.ttc",
    "wqy-zenhei.ttc",
)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Box = tuple[int, int, int, int]  # left, top, right, bottom
Place = tuple[int, tuple[int, int], int]  # class id, the point (x, y) farthest from its outline, that distance


class Overlay:
    needs_photo = True
    needs = "mask"

    def files(self, name: str, folder: Path) -> list[Path]:
        return [folder / "overlays" / f"{name}.jpg"]

    def write(self, item: Item, folder: Path) -> None:
        assert item.rgb is not None
        with atomic(self.files(item.name, folder)[0]) as temporary:
            Image.fromarray(draw(item.rgb, item.labels, item.classes)).save(temporary, format="JPEG", quality=90)


def draw(rgb: NDArray[np.uint8], mask: NDArray[np.uint8], classes: tuple[str, ...]) -> NDArray[np.uint8]:
    """Tint, outline and name the classes of a mask on an H x W x 3 photo."""
    canvas = rgb.copy()
    long = max(mask.shape)
    width = max(1, round(long / 300))
    places: list[Place] = []
    for number in np.unique(mask):
        if 0 < number < len(classes):
            part = (mask == number).astype(np.uint8)
            inside = part > 0
            tint = np.array(colour(int(number)), np.float32)
            canvas[inside] = (canvas[inside] * (1 - TINT) + tint * TINT).astype(np.uint8)
            inner = cv2.distanceTransform(np.pad(part, 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
            canvas[inside & (inner <= 2 * width)] = 0 if _is_light(int(number)) else 255  # contrast on any photo
            canvas[inside & (inner <= width)] = tint.astype(np.uint8)
            y, x = np.unravel_index(int(inner.argmax()), inner.shape)
            places.append((int(number), (int(x), int(y)), int(inner.max())))
    return _named(canvas, places, classes, max(11, round(long / 35)))


def _is_light(number: int) -> bool:
    red, green, blue = colour(number)
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140


def _named(canvas: NDArray[np.uint8], places: list[Place], classes: tuple[str, ...], size: int) -> NDArray[np.uint8]:
    """Write each name into a box: inside its class, or above if the class is smaller than the box.

    A box that would cover an earlier one moves down, or up.
    """
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    taken: list[Box] = []
    for number, (x, y), radius in places:
        font = _font(classes[number], size)
        extent = pen.textbbox((0, 0), classes[number], font=font)
        pad = max(2, size // 5)
        shape = int(extent[2] - extent[0]) + 2 * pad, int(extent[3] - extent[1]) + 2 * pad
        lift = 0 if 2 * radius > shape[1] else radius + shape[1] // 2 + 2
        box = _free((x, y - lift), shape, picture.size, taken)
        taken.append(box)
        pen.rectangle(box, fill=colour(number))
        origin = box[0] + pad - extent[0], box[1] + pad - extent[1]
        pen.text(origin, classes[number], font=font, fill="black" if _is_light(number) else "white")
    return np.asarray(picture, np.uint8)


def _free(place: tuple[int, int], shape: tuple[int, int], size: tuple[int, int], taken: list[Box]) -> Box:
    """A box of this shape (width, height) in the picture, as near above or below the place as others allow."""
    left = max(0, min(place[0] - shape[0] // 2, size[0] - shape[0]))
    best: Box | None = None
    for step in range(-(-size[1] // shape[1])):
        for top in {place[1] - shape[1] // 2 + step * shape[1], place[1] - shape[1] // 2 - step * shape[1]}:
            top = max(0, min(top, size[1] - shape[1]))
            box = left, top, left + shape[0], top + shape[1]
            best = best or box
            if not any(box[0] < x2 and x1 < box[2] and box[1] < y2 and y1 < box[3] for x1, y1, x2, y2 in taken):
                return box
    return best or (left, 0, left + shape[0], shape[1])


@cache
def _font(text: str, size: int) -> Font:
    """The first font that has all characters of the text."""
    for name in FONTS:
        try:
            font = ImageFont.truetype(name, size)
        except OSError:
            continue
        missing = bytes(font.getmask("\uffff"))
        if not any(bytes(font.getmask(char)) == missing for char in text if not char.isspace()):
            return font
    return ImageFont.load_default(size)
