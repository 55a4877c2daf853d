"""Manifests: each output folder records its provenance and hashes, so that stale or damaged outputs are detected."""

import json
import platform
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.stores.files import atomic, flush, sha256

NAME = "manifest.json"
FIELDS: dict[str, type] = {"stage": str, "code": str, "params": dict, "inputs": dict, "outputs": dict}
VERSIONED = ("torch", "torchvision", "timm", "numpy", "opencv-contrib-python-headless", "h5py", "pydensecrf2")


def read(folder: Path) -> dict[str, Any] | None:
    """Read the manifest in ``folder``; None if it is missing or not a JSON mapping.

    A field of FIELDS that is missing or has another type is empty, so that it matches nothing.
    """
    try:
        manifest = json.loads((folder / NAME).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict):
        return None
    return manifest | {key: kind() for key, kind in FIELDS.items() if not isinstance(manifest.get(key), kind)}


def remove(folder: Path) -> None:
    """Remove the manifest before the first output is replaced: a killed run must not leave new outputs under it."""
    (folder / NAME).unlink(missing_ok=True)
    with suppress(OSError):  # some file systems cannot flush a folder
        flush(folder)


def write(folder: Path, **fields: Any) -> None:
    """Write the manifest atomically; the versions of Python and the numerical packages are added."""
    versions = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    with atomic(folder / NAME) as path:
        path.write_text(json.dumps({**fields, "versions": versions}, indent=1, sort_keys=True) + "\n")


def verify(path: Path, required: bool = False) -> str:
    """Return the sha256 of ``path`` after comparing it with the manifest in the same folder.

    Without an entry in a manifest the file passes unless ``required`` says that a stage must have published it.

    Call this before opening a store or checkpoint: PyTorch loads a checkpoint with a flipped bit without an error, and
    a corrupt HDF5 file can hang the library.

    Raises:
        PipelineError: the file cannot be read, or it differs from the one that was published.
    """
    manifest = read(path.parent)
    expected = manifest["outputs"].get(path.name) if manifest else None
    if required and expected is None:
        raise PipelineError(f"{path}: has no manifest, since its stage was interrupted; run its stage again")
    try:
        actual = sha256(path)
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read ({error.strerror}); fix its permissions, or replace it") from None
    if expected is not None and expected != actual:
        raise PipelineError(
            f"{path}: damaged or changed by hand: sha256 is {actual}, its manifest says {expected}; "
            f"delete {path} and run its stage again"
        )
    return actual


def host() -> str:
    """Describe the machine for manifests and reports, e.g. 'Linux x86_64, Python 3.11'."""
    return f"{platform.system()} {platform.machine()}, Python {sys.version_info.major}.{sys.version_info.minor}"
