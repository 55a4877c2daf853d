"""What the conversions of published datasets into VOC layout share."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]  # items, label, number of items
GENERATED = ("JPEGImages", "SegmentationClass", "ImageSets", "tags.json", "boxes.json")


def refuse_others(root: Path, mark: str, key: str) -> None:
    """Check that ``root`` may be written to.

    Args:
        mark: name of the marker file, which says that the folder was generated and is not a user's dataset.
        key: the key of params.yaml that names the source.

    Raises:
        PipelineError: ``root`` holds another dataset.
    """
    if not (root / mark).exists() and any((root / name).exists() for name in GENERATED):
        fix = f"choose another dataset.root, or set dataset.{key} to null"
        raise PipelineError(f"{root}: holds another dataset; {fix}")


def link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it if the file system does not allow that."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
