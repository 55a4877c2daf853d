"""HDF5 container for 8-bit rasters of varying size: attention, localization maps, saliency, labels and predictions.

The pixels of all rasters are concatenated in ``values`` (flat uint8, gzip level 1 or uncompressed). The columns
``offset`` (int64), ``height``, ``width`` (int32), ``image`` (int32 index into ``image_ids``) and ``class_id`` (int16; 0
for a raster without a class) have one row per raster. Rows of one image are contiguous. A map stores value / 255; a
label map stores class ids (0 background, 255 ignore). The attribute ``kind`` names the contents, and
``arithmetic`` lists the kinds of arithmetic in which they were computed, one a line (``pipeline.arithmetic``).
"""

import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline import arithmetic, interrupts
from pipeline.errors import PipelineError
from pipeline.stores import isolated
from pipeline.stores.hdf5 import NewFile

Raster = NDArray[np.uint8]
CHUNK = 1 << 16
BUFFER = 1 << 24
MOST = 1 << 30  # bytes of a column, of a raster and of a chunk that are read
COLUMNS = (("offset", "i8"), ("height", "i4"), ("width", "i4"), ("image", "i4"), ("class_id", "i2"))


class RasterWriter:
    """Append rasters image by image, with one write buffer whatever the number of images.

    Write to a temporary path and rename it (``stores.files``): a published store is never opened for update.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self._new = NewFile(path)
        self._new.file.attrs["kind"] = kind
        self._values = self._new.file.create_dataset(
            "values", (0,), np.uint8, maxshape=(None,), chunks=(CHUNK,), compression="gzip", compression_opts=1
        )
        self._pending: list[Raster] = []
        self._pending_bytes = 0
        self._total = 0
        self._rows = array("q")  # five numbers a raster
        self._images: dict[str, int] = {}

    def append(self, image_id: str, raster: Raster, class_id: int = 0) -> None:
        """Append one H x W uint8 raster.

        Raises:
            ValueError: the raster is not 2-D uint8, or the image's rows would not be contiguous.
        """
        if raster.ndim != 2 or raster.dtype != np.uint8:
            raise ValueError(f"a raster is 2-D uint8, not {raster.ndim}-D {raster.dtype}")
        image = self._images.setdefault(image_id, len(self._images))
        if image != len(self._images) - 1:
            raise ValueError(f"rows of image {image_id} must be contiguous")
        self._rows.extend((self._total, *raster.shape, image, class_id))
        self._pending.append(np.ascontiguousarray(raster).reshape(-1))
        self._pending_bytes += raster.size
        self._total += raster.size
        if self._pending_bytes >= BUFFER:
            self._flush()

    def add_image(self, image_id: str) -> None:
        """Register an image that may have no raster, so that readers can tell it from an unknown image."""
        self._images.setdefault(image_id, len(self._images))

    def _flush(self) -> None:
        if self._pending:
            start = self._values.shape[0]
            with interrupts.deferred():
                self._values.resize((self._total,))
                self._values[start:] = np.concatenate(self._pending)
            self._new.check()
            self._pending, self._pending_bytes = [], 0

    def close(self) -> None:
        with self._new as new:
            self._flush()
            _write_rows(new.file, list(self._images), np.frombuffer(self._rows, np.int64).reshape(-1, 5))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._new.close()


def write_store(
    path: Path, kind: str, image_ids: Sequence[str], rows: NDArray[np.int64], values: NDArray[np.uint8]
) -> None:
    """Write a complete store at once, uncompressed, from rasters that are already in one array.

    Args:
        image_ids: all images, including those without a raster.
        rows: R x 5: offset in ``values``, height, width, image (index into ``image_ids``) and class id of each raster,
            sorted by image.
        values: flat uint8 array, written as it is; the rasters may be in any order.
    """
    with NewFile(path) as new, interrupts.deferred():
        new.file.attrs["kind"] = kind
        new.file.create_dataset("values", data=values)
        _write_rows(new.file, image_ids, rows)


def _write_rows(file: h5py.File, image_ids: Sequence[str], rows: NDArray[np.int64]) -> None:
    file.attrs["arithmetic"] = "\n".join(arithmetic.used())
    for column, (name, dtype) in enumerate(COLUMNS):
        file.create_dataset(name, data=rows[:, column].astype(dtype))
    ids = np.array([name.encode() for name in image_ids], dtype=bytes)
    file.create_dataset("image_ids", data=ids if len(ids) else np.zeros(0, "S1"))


class RasterStore:
    """Read a store by image id and class id. Loader workers may use it, forked or spawned: each opens the file anew.

    A store that a user supplies is opened with ``open_foreign``.

    Raises:
        PipelineError: the file is not a raster store, or its columns contradict each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pid = -1
        self._handle: h5py.File | None = None
        try:
            file = self._file()
            self.kind = str(file.attrs["kind"])
            self.arithmetic = str(file.attrs.get("arithmetic", "")).splitlines()
            self._names = _column(file, "image_ids", "S")
            self._sorted = _sorted(self._names)
            columns = [_column(file, name, dtype) for name, dtype in COLUMNS]
            _check_columns(np.stack(columns, 1).astype(np.int64), len(self._names), _stored(file))
        except Exception as error:  # h5py and NumPy raise many types for a damaged file
            raise PipelineError(f"{path}: not a raster store ({_cause(error)}); run its stage again") from error
        self._offset, self._height, self._width, images, self._class = columns
        self._start = np.searchsorted(images, np.arange(len(self._names) + 1))

    def _file(self) -> h5py.File:
        if self._handle is None or self._pid != os.getpid():
            self._handle, self._pid = h5py.File(self.path, "r", locking=False), os.getpid()
        return self._handle

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handle": None}  # a process that is spawned opens the file by itself

    def __contains__(self, image_id: str) -> bool:
        return self._find(image_id) is not None

    def __len__(self) -> int:
        return len(self._offset)

    def _find(self, image_id: str) -> int | None:
        """The number of the image, by bisection: a dict of strings would take far more memory than the columns."""
        name = image_id.encode(errors="surrogatepass")  # no id of a store has surrogates
        if len(name) > self._names.itemsize:  # NumPy would copy the column to compare it with a longer id
            return None
        at = int(np.searchsorted(self._names, np.bytes_(name), sorter=self._sorted))
        if at == len(self._sorted):
            return None
        image = int(self._sorted[at])
        return image if self._names[image] == name else None

    def _rows(self, image_id: str) -> range:
        image = self._find(image_id)
        if image is None:
            raise KeyError(f"{self.path} has no image {image_id}")
        return range(int(self._start[image]), int(self._start[image + 1]))

    def classes(self, image_id: str) -> list[int]:
        """Class ids of the image's rasters, in stored order."""
        return [int(self._class[row]) for row in self._rows(image_id)]

    def _read(self, row: int) -> Raster:
        start, height, width = int(self._offset[row]), int(self._height[row]), int(self._width[row])
        try:
            values: Raster = self._file()["values"][start : start + height * width]
        except (OSError, RuntimeError) as error:
            raise PipelineError(f"{self.path}: damaged raster store ({_cause(error)}); run its stage again") from error
        return values.reshape(height, width)

    def shape(self, image_id: str, class_id: int = 0) -> tuple[int, int]:
        """(height, width) of this raster, which is not read.

        Raises:
            KeyError: the store has no such raster.
        """
        row = self._row(image_id, class_id)
        return int(self._height[row]), int(self._width[row])

    def get(self, image_id: str, class_id: int = 0) -> Raster:
        """H x W uint8 raster of this class in the image.

        Raises:
            KeyError: the store has no such raster.
        """
        return self._read(self._row(image_id, class_id))

    def _row(self, image_id: str, class_id: int) -> int:
        for row in self._rows(image_id):
            if self._class[row] == class_id:
                return row
        raise KeyError(f"{self.path} has no class {class_id} of image {image_id}")

    def maps(self, image_id: str) -> dict[int, Raster]:
        """All rasters of the image by class id; empty if it has none.

        Raises:
            KeyError: the store does not list the image.
        """
        return {int(self._class[row]): self._read(row) for row in self._rows(image_id)}

    def __iter__(self) -> Iterator[str]:
        """The ids of all images, in stored order, including those without a raster."""
        return (name.decode() for name in self._names)

    def read_all(self) -> None:
        """Read every raster once.

        Raises:
            PipelineError: a raster is damaged.
        """
        for row in range(len(self)):
            self._read(row)


def open_foreign(path: Path) -> RasterStore:
    """Open a store that a user supplies, after reading all of it in a process that may die.

    Raises:
        PipelineError: the file is not a raster store or is damaged, also where HDF5 crashes or hangs on it.
    """
    try:
        isolated.call(_read_all, path)
    except isolated.Failed as error:
        raise PipelineError(f"{path}: {error}; run its stage again, or copy it again") from None
    return RasterStore(path)


def _read_all(path: Path) -> None:
    RasterStore(path).read_all()


def _cause(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _dataset(file: h5py.File, name: str, kind: str) -> h5py.Dataset:
    """A one-dimensional dataset whose bytes all lie in the file, and whose type is ``kind``, such as 'i4' or 'S'."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is missing or a link")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 1 or dataset.is_virtual or dataset.external:
        raise ValueError(f"{name} is not a one-dimensional dataset of this file")
    if dataset.dtype.kind != kind[0] or kind[1:] not in ("", str(dataset.dtype.itemsize)):
        raise ValueError(f"{name} is {dataset.dtype}, not {kind}")
    # gzip packs 1032 bytes into one at best. More would be values that the file does not contain.
    if dataset.nbytes > 1100 * dataset.id.get_storage_size() + CHUNK:
        raise ValueError(f"{name} has {dataset.nbytes} bytes, most of which are not stored")
    return dataset


def _column(file: h5py.File, name: str, kind: str) -> NDArray[Any]:
    dataset = _dataset(file, name, kind)
    if dataset.nbytes > MOST:
        raise ValueError(f"{name} has {dataset.nbytes} bytes")
    return np.asarray(dataset[:])


def _sorted(names: NDArray[np.bytes_]) -> NDArray[np.intp]:
    """The order of the ids by their bytes.

    Raises:
        ValueError: an id occurs twice, or is not UTF-8.
    """
    for name in names:
        name.decode()
    order = np.argsort(names, kind="stable")
    if (names[order[1:]] == names[order[:-1]]).any():
        raise ValueError("image_ids has an id twice")
    return order


def _stored(file: h5py.File) -> int:
    """Number of stored values."""
    values = _dataset(file, "values", "u1")
    if values.chunks and values.chunks[0] > MOST:
        raise ValueError(f"values has chunks of {values.chunks[0]} bytes")
    return int(values.shape[0])


def _check_columns(rows: NDArray[np.int64], images: int, stored: int) -> None:
    """Check R x 5 rows (see ``COLUMNS``) against the number of images and that of stored values."""
    offset, height, width, image, _ = rows.T
    if (np.diff(image) < 0).any() or (image < 0).any() or (image >= images).any():
        raise ValueError("image is not a sorted column of indices into image_ids")
    size = height * width
    if (height < 0).any() or (width < 0).any() or (size > MOST).any():
        raise ValueError("height and width are not those of rasters")
    if (offset < 0).any() or (offset > stored - size).any() or size.sum() > stored:
        raise ValueError(f"its rasters lie outside of the {stored} stored values, or overlap")
