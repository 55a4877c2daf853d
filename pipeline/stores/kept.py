"""Outputs that outlive their deletion by Snakemake.

Snakemake deletes the outputs of a job before it runs it, also if only a job before it has to run. That job may write
the same bytes again, such as an index with one more evaluation image. Hard links keep the outputs until the stage,
which compares contents, has decided.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def keep(paths: Iterable[Path]) -> None:
    """Link each file to its hidden name. A file system without hard links keeps nothing."""
    for path in paths:
        with suppress(OSError):
            _hidden(path).unlink(missing_ok=True)
            os.link(path, _hidden(path))


def restore(paths: Iterable[Path]) -> None:
    """Rename the kept files to their names if all are kept and all files themselves are gone."""
    paths = list(paths)
    if all(_hidden(path).exists() for path in paths) and not any(path.exists() for path in paths):
        for path in paths:  # the manifest, which is the last, makes them count
            os.replace(_hidden(path), path)


def drop(paths: Iterable[Path]) -> None:
    """Remove what is kept."""
    for path in paths:
        with suppress(OSError):
            _hidden(path).unlink(missing_ok=True)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.kept")
