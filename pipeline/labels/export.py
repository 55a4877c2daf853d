"""Stores as folders of PNG, for eyes and for other people's tools."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.palette import voc_palette
from pipeline.errors import PipelineError
from pipeline.stores.files import atomic
from pipeline.stores.raster import Raster, RasterStore

LABELS = "labels"  # the kind of a store whose values are class ids


def write_png(path: Path, raster: Raster, palette: NDArray[np.uint8] | None = None) -> None:
    """Write H x W values as a palette (mode P) or grey (mode L) PNG, atomically, and read it back.

    Without its palette a mode P image may be packed to fewer bits, and its labels change without an error.

    Raises:
        PipelineError: what is read back differs.
    """
    image = Image.fromarray(np.ascontiguousarray(raster), "L")
    if palette is not None:
        image.putpalette(palette.tobytes())
    with atomic(path) as temporary:
        image.save(temporary, format="PNG")
        with Image.open(temporary) as written:
            if written.mode != image.mode or not np.array_equal(np.asarray(written), raster):
                raise PipelineError(f"{path}: reads back other values than were written; check the disk and Pillow")


def export(store: RasterStore, folder: Path) -> int:
    """Write every raster of the store and return how many: ID.png, or ID_CLASS.png where rasters have a class.

    Label maps get VOC's palette; attention, localization and saliency maps are grey.
    """
    palette = voc_palette() if store.kind == LABELS else None
    written = 0
    for image_id in store:
        for class_id, raster in store.maps(image_id).items():
            name = f"{image_id}_{class_id}.png" if class_id else f"{image_id}.png"
            write_png(folder / name, raster, palette)
            written += 1
    return written
