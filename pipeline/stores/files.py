"""File hashes, safe opening and atomic writes."""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading, following links. Anything else could block: a FIFO waits for a writer.

    Raises:
        OSError: the file cannot be opened, or it is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path) -> bytes:
    """Read a regular file; raises what ``open_regular`` raises."""
    with open_regular(path) as file:
        return file.read()


def sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes; raises what ``open_regular`` raises."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def partial(path: Path) -> Path:
    """Temporary path at which ``path`` is written until it is complete."""
    return path.with_name(f".{path.name}.partial")


def publish(path: Path, temporary: Path | None = None) -> None:
    """Flush ``temporary`` (``partial(path)``) to disk and rename it to ``path``.

    A folder replaces the one at ``path``. The files in it are not flushed, since they may be thousands: a manifest
    detects those that a power failure loses.
    """
    temporary = temporary or partial(path)
    if temporary.is_dir() and path.is_dir():
        shutil.rmtree(path)
    flush(temporary)
    os.replace(temporary, path)


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path and rename it to ``path`` if the block ends without an exception; else remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial(path)
        publish(path)
    except BaseException:
        partial(path).unlink(missing_ok=True)
        raise


def folders_above(path: Path) -> set[tuple[int, int]]:
    """Device and inode of each folder that contains ``path``, links resolved; unreadable ones are left out."""
    found = set()
    for folder in Path(os.path.realpath(path)).parents:
        with suppress(OSError):
            status = os.stat(folder)
            found.add((status.st_dev, status.st_ino))
    return found
