"""The manifest beside each output: what it was made of, so that nothing stale or damaged is trusted."""

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
    """The manifest in ``folder``, or None where there is none or it is not whole."""
    try:
        found = json.loads((folder / NAME).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write(folder: Path, **fields: Any) -> None:
    """Write the manifest, with the versions of what computed the outputs, atomically."""
    versions = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    with atomic(folder / NAME) as path:
        path.write_text(json.dumps({**fields, "versions": versions}, indent=1, sort_keys=True) + "\n")


def verify(path: Path) -> str:
    """Return the sha256 of ``path``; refuse it if the manifest beside it says another.

    Called before a store or checkpoint is opened: a flipped bit in a checkpoint loads silently, and a corrupt
    HDF5 file can hang the library.

    Raises:
        PipelineError: the file's bytes are not those that were published.
    """
    found = sha256(path)
    manifest = read(path.parent)
    expected = manifest.get("outputs", {}).get(path.name) if manifest else None
    if expected is not None and expected != found:
        raise PipelineError(
            f"{path}: damaged or changed by hand: sha256 is {found}, its manifest says {expected}; "
            f"delete {path} and run its stage again"
        )
    return found


def host() -> str:
    """The machine in words, for manifests and reports."""
    return f"{platform.system()} {platform.machine()}, Python {sys.version_info.major}.{sys.version_info.minor}"
