"""The arithmetic that a job computes in: precision, processor and number of threads.

The sums of a training depend on it in their last bits, and a training amplifies them. A job records all kinds of
arithmetic that it has used in its manifest, its log and its stores. Results remain up to date under another kind.
This module does not import torch, because many stages do without it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_used: dict[str, None] = {}  # descriptions, in order of first use


def note(descriptions: Iterable[str]) -> None:
    """Record kinds of arithmetic, such as 'bf16 on CPU (AVX512_BF16), 1 thread', as used by the current job."""
    _used.update(dict.fromkeys(descriptions))


def used() -> list[str]:
    """Return the kinds of arithmetic that the current job has used, in order of first use."""
    return list(_used)


@contextmanager
def recording() -> Iterator[None]:
    """Record the block's arithmetic on its own: ``used`` is empty at first, and afterwards what it was before."""
    before = dict(_used)
    _used.clear()
    try:
        yield
    finally:
        _used.clear()
        _used.update(before)
