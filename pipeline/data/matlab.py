"""MATLAB files, in which some datasets keep their masks."""

import importlib
from collections.abc import Callable
from typing import Any

from pipeline.errors import PipelineError


def loader(what: str) -> Callable[..., dict[str, Any]]:
    """scipy's ``loadmat``: from a file to its variables by name. Only what reads MATLAB files needs scipy.

    Args:
        what: the files, for the error.

    Raises:
        PipelineError: scipy is not installed.
    """
    try:
        scipy_io: Any = importlib.import_module("scipy.io")
    except ImportError:
        raise PipelineError(f"scipy: not installed, but {what} are MATLAB files; run 'pip install scipy'") from None
    return scipy_io.loadmat
