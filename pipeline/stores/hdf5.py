"""Writing of new HDF5 files, so that a full disk is an error with the file's name and not a crash.

HDF5 does not recover from a failed write: it writes again when the file is closed and when the process exits, and then
crashes. It therefore writes through ``_Disk``, which keeps the first error and reports success to HDF5.
"""

import io
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py

from pipeline import interrupts


class _Disk(io.FileIO):
    """A file that never fails. After the first error it drops what is written to it."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while self.error is None and done < len(view):
            try:
                done += super().write(view[done:])
            except OSError as error:
                self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0


class NewFile:
    """A new HDF5 file at ``path``. ``file`` is open until the end of the ``with`` block.

    Raises:
        OSError: the disk is full or fails, once ``check`` is called or the block ends.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._disk = _Disk(path, "w+")
        self.file = h5py.File(self._disk, "w", track_order=False)

    def check(self) -> None:
        """Raise the first error of the disk."""
        if (error := self._disk.error) is not None:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self._path)) from None

    def close(self) -> None:
        with interrupts.deferred():  # an exception in ``_Disk`` would be a failed write
            self.file.close()
            self._disk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
        if kind is None:
            self.check()
