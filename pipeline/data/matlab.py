"""Reader of MATLAB files, the format of some datasets' masks."""

import importlib
from collections.abc import Callable
from typing import Any

from pipeline.errors import PipelineError


def loader(description: str) -> Callable[..., dict[str, Any]]:
    """Return ``scipy.io.loadmat``, which maps a file to its variables by name; scipy is an optional dependency.

    Args:
        description: names the files in the error, e.g. "SBD's masks".

    Raises:
        PipelineError: scipy is not installed.
    """
    try:
        scipy_io: Any = importlib.import_module("scipy.io")
    except ImportError:
        raise PipelineError(
            f"scipy: not installed, but {description} are MATLAB files; run 'pip install scipy'"
        ) from None
    return scipy_io.loadmat
