"""``png``: masks/PHOTO.png, a palette PNG whose indices are the class ids.

0 is the background. 255 is a pixel without a label, as pseudo labels have.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.palette import voc_palette
from pipeline.errors import PipelineError
from pipeline.stores.files import atomic
from wsss.formats.base import Item


class Png:
    needs_photo = False
    needs = "mask"

    def files(self, name: str, folder: Path) -> list[Path]:
        return [folder / "masks" / f"{name}.png"]

    def write(self, item: Item, folder: Path) -> None:
        write_png(self.files(item.name, folder)[0], item.labels, voc_palette())


def write_png(path: Path, raster: NDArray[np.uint8], palette: NDArray[np.uint8] | None = None) -> None:
    """Write H x W values as a palette (mode P) or grey (mode L) PNG, atomically, and read it back.

    The check is needed because Pillow may pack a mode P image to fewer bits, which silently changes labels.

    Raises:
        PipelineError: the values read back differ.
    """
    image = Image.fromarray(np.ascontiguousarray(raster))
    if palette is not None:
        image.putpalette(palette.tobytes())
    with atomic(path) as temporary:
        image.save(temporary, format="PNG")
        with Image.open(temporary) as written:
            if written.mode != image.mode or not np.array_equal(np.asarray(written), raster):
                raise PipelineError(
                    f"{path}: the values read back differ from those written; check the disk and Pillow"
                )
