"""Decoded images that stay in memory, shared by the processes of a training.

The memory belongs to no file and no folder: it is not limited by the size of /dev/shm, and it is freed with the last
process. Pages are allocated as they are filled.
"""

import mmap
import os
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import memory

CHECK_EVERY = 64  # arrays stored between two looks at the free memory


class Cache:
    """Arrays of bytes by number. The first numbers have a place, as far as the budget goes.

    Forked processes share it, and so do spawned ones that get it as an argument. An array counts as stored once all of
    it is written, so that a process that is killed leaves no half.
    """

    def __init__(self, sizes: Sequence[int], budget: int, reserve: int = 0) -> None:
        """
        Args:
            sizes: bytes of each array.
            budget: bytes of all arrays at most.
            reserve: bytes of memory to leave to others; if less is free, nothing more is stored.
        """
        ends = np.cumsum(np.asarray(sizes, np.int64))
        self.count = int(np.searchsorted(ends, budget, side="right"))  # arrays that have a place
        self.ends = ends[: self.count]
        self.reserve = reserve
        self._until_check = 0
        self._open(os.memfd_create("wsss-cache"))

    @property
    def size(self) -> int:
        """Bytes of all arrays that have a place."""
        return int(self.ends[-1]) if self.count else 0

    def _open(self, descriptor: int) -> None:
        self._descriptor = descriptor
        os.ftruncate(descriptor, self.size + self.count + 1)  # a mapping is not empty
        whole = np.frombuffer(mmap.mmap(descriptor, self.size + self.count + 1), np.uint8)
        self._values, self._stored = whole[: self.size], whole[self.size :]

    def _slot(self, number: int) -> slice:
        return slice(int(self.ends[number - 1]) if number else 0, int(self.ends[number]))

    def get(self, number: int) -> NDArray[np.uint8] | None:
        """The array, flat and read-only; None if it is not stored."""
        if number >= self.count or not self._stored[number]:
            return None
        values = self._values[self._slot(number)]
        values.flags.writeable = False
        return values

    def put(self, number: int, values: NDArray[np.uint8]) -> None:
        """Store the array if it has a place and memory is left."""
        if number >= self.count or not self._has_memory():
            return
        self._values[self._slot(number)] = values.reshape(-1)
        self._stored[number] = 1

    def _has_memory(self) -> bool:
        if self._until_check == 0:
            if memory.available() < self.reserve:
                return False
            self._until_check = CHECK_EVERY
        self._until_check -= 1
        return True

    def __del__(self) -> None:
        os.close(self._descriptor)  # the mapping keeps the memory as long as an array of it is in use

    def __getstate__(self) -> dict[str, Any]:
        """For a process that is being spawned: the memory is passed on, not copied."""
        fields = {name: value for name, value in vars(self).items() if name not in ("_values", "_stored")}
        return {**fields, "_descriptor": DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        descriptor = state.pop("_descriptor").detach()
        vars(self).update(state)
        self._open(descriptor)
