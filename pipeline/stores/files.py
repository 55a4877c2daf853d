"""Hashes, and files that appear whole or not at all."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCES = (".py", ".j2", ".css")  # file name endings of code: Python, templates and the style sheet of the report


def sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """What an input is: a file's sha256, or for a folder the sha256 of its sorted (path, size) listing.

    A dataset's folder is listed, not read: its images' own hashes are in the index. Hidden files are left out.
    """
    if not path.is_dir():
        return sha256(path)
    digest = hashlib.sha256()
    for entry in sorted(_walk(path, "")):
        digest.update(f"{entry[0]}\0{entry[1]}\n".encode())
    return digest.hexdigest()


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name, entry.stat().st_size


def partial(path: Path) -> Path:
    """The temporary name under which ``path`` is written until it is whole."""
    return path.with_name(f".{path.name}.partial")


def publish(path: Path) -> None:
    """Flush ``partial(path)`` to the disk and rename it to ``path``; a folder takes the place of the old one whole."""
    temporary = partial(path)
    if temporary.is_dir() and path.exists():
        shutil.rmtree(path)
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path; rename it to ``path`` if the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    yield partial(path)
    publish(path)
