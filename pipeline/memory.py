"""Shortage of memory, on the CPU or a GPU, as a fault that names the cause and the parameters that reduce it."""

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import PipelineError

# Parts of the messages of torch, oneDNN, OpenCV and C++ for allocations that failed.
_MESSAGES = (
    "can't allocate memory",
    "out of memory",
    "insufficient memory",
    "bad_alloc",
    "alloc_failed",
    "could not create a memory",
    "could not create a primitive",
    "could not execute a primitive",
)


def is_shortage(error: BaseException) -> bool:
    """Whether the error says that an allocation failed."""
    return isinstance(error, MemoryError) or any(part in str(error).lower() for part in _MESSAGES)


@contextmanager
def shortage(where: str, fix: str) -> Iterator[None]:
    """Turn an allocation that failed into a PipelineError 'WHERE: out of memory; FIX'."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        if not is_shortage(error):
            raise
        raise PipelineError(f"{where}: out of memory; {fix}") from error
