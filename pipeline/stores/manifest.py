"""Manifests: each output folder records its provenance and hashes, so that stale or damaged outputs are detected."""

import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.stores.files import atomic, sha256

NAME = "manifest.json"
VERSIONED = ("torch", "torchvision", "numpy", "opencv-contrib-python-headless", "h5py", "pydensecrf2")


def read(folder: Path) -> dict[str, Any] | None:
    """Read the manifest in ``folder``; None if it is missing or not valid JSON."""
    try:
        manifest = json.loads((folder / NAME).read_text())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


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


def verify(path: Path) -> str:
    """Return the sha256 of ``path`` after comparing it with the manifest in the same folder.

    Call this before opening a store or checkpoint: PyTorch loads a checkpoint with a flipped bit without an error, and
    a corrupt HDF5 file can hang the library.

    Raises:
        PipelineError: the file differs from the one that was published.
    """
    actual = sha256(path)
    manifest = read(path.parent)
    expected = manifest.get("outputs", {}).get(path.name) if manifest else None
    if expected is not None and expected != actual:
        raise PipelineError(
            f"{path}: damaged or changed by hand: sha256 is {actual}, its manifest says {expected}; "
            f"delete {path} and run its stage again"
        )
    return actual


def host() -> str:
    """Describe the machine for manifests and reports, e.g. 'Linux x86_64, Python 3.11'."""
    return f"{platform.system()} {platform.machine()}, Python {sys.version_info.major}.{sys.version_info.minor}"
