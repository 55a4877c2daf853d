"""Export of raster stores to folders of PNG files, for viewing and for other tools."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.palette import voc_palette
from pipeline.errors import PipelineError
from pipeline.stores.files import atomic
from pipeline.stores.raster import Raster, RasterStore

LABELS = "labels"  # kind of the stores that hold class ids


def write_png(path: Path, raster: Raster, palette: NDArray[np.uint8] | None = None) -> None:
    """Write H x W values as a palette (mode P) or grey (mode L) PNG, atomically, and read it back.

    The check is needed because Pillow may pack a mode P image to fewer bits, which silently changes labels.

    Raises:
        PipelineError: the values read back differ.
    """
    image = Image.fromarray(np.ascontiguousarray(raster), "L")
    if palette is not None:
        image.putpalette(palette.tobytes())
    with atomic(path) as temporary:
        image.save(temporary, format="PNG")
        with Image.open(temporary) as written:
            if written.mode != image.mode or not np.array_equal(np.asarray(written), raster):
                raise PipelineError(
                    f"{path}: the values read back differ from those written; check the disk and Pillow"
                )


def export(store: RasterStore, folder: Path) -> int:
    """Write every raster of the store as ID.png, or ID_CLASS.png if it has a class, and return their number.

    Label maps use the VOC palette; attention, localization and saliency maps are grey.
    """
    palette = voc_palette() if store.kind == LABELS else None
    written = 0
    for image_id in store:
        for class_id, raster in store.maps(image_id).items():
            name = f"{image_id}_{class_id}.png" if class_id else f"{image_id}.png"
            write_png(folder / name, raster, palette)
            written += 1
    return written
