"""Export of raster stores to folders of PNG files, for viewing and for other tools."""

from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.palette import voc_palette
from pipeline.errors import PipelineError
from pipeline.stores.files import atomic, partial
from pipeline.stores.raster import Raster, RasterStore

LABELS = "labels"  # kind of the stores that hold class ids
SHOWN = 5  # faulty ids that are reported


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

    Label maps use the VOC palette; attention, localization and saliency maps are grey. An id may contain folders, as in
    snapshots.h5 ('EPOCH/IMAGE').

    Raises:
        PipelineError: an id is not the name of a file in ``folder``, in which case nothing is written; or a file cannot
            be written.
    """
    _check_names(store)
    palette = voc_palette() if store.kind == LABELS else None
    written = 0
    for image_id in store:
        for class_id, raster in store.maps(image_id).items():
            path = folder / _name(image_id, class_id)
            try:
                write_png(path, raster, palette)
            except OSError as error:
                with suppress(OSError):
                    partial(path).unlink()
                raise PipelineError(f"{path}: cannot be written ({error.strerror}); fix it and export again") from None
            written += 1
    return written


def _name(image_id: str, class_id: int) -> str:
    return f"{image_id}_{class_id}.png" if class_id else f"{image_id}.png"


def _check_names(store: RasterStore) -> None:
    """Check that each raster's file has a name of its own inside of the folder. Stores may be users' files."""
    names: dict[str, str] = {}
    faults = []
    for image_id in store:
        parts = image_id.split("/")
        if any(part in ("", ".", "..") for part in parts) or not image_id.isprintable():
            faults.append(f"{store.path}: the image id {image_id!r} is not a file name; rename it in the store")
        for class_id in store.classes(image_id):
            name = _name(image_id, class_id)
            if (other := names.setdefault(name, image_id)) != image_id:
                faults.append(f"{store.path}: {other!r} and {image_id!r} would both be {name}; rename one in the store")
    if faults:
        more = [f"{store.path}: and {len(faults) - SHOWN} more such ids"] if len(faults) > SHOWN else []
        raise PipelineError(*faults[:SHOWN], *more)
