"""File hashes and atomic writes."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCES = (".py", ".j2", ".css")  # suffixes of source files: Python, report templates and style sheet


def sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """Identify an input: sha256 of a file, or of a folder's sorted (path, size) listing.

    Files in a folder are not read: the index already has the hash of every image. Hidden files are skipped.
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
    """Temporary path at which ``path`` is written until it is complete."""
    return path.with_name(f".{path.name}.partial")


def publish(path: Path) -> None:
    """Flush ``partial(path)`` to disk and rename it to ``path``; a folder replaces an existing one."""
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
    """Yield a temporary path and rename it to ``path`` if the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    yield partial(path)
    publish(path)
