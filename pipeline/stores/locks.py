"""Locks between processes, on file systems that may have none: Lustre mounted without them, some NFS.

The system frees a lock when the process that holds it ends, however it ends. Every lock of the project is taken here.
HDF5's own locks are off (``stores.raster``): a store is written under a temporary name and never changed afterwards.
"""

import errno
import fcntl
import sys
from enum import Enum
from typing import IO, Any

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_warned: set[str] = set()


class Lock(Enum):
    """What ``take`` found."""

    HELD = "held"  # by this process now, until it closes the file or ends
    BUSY = "busy"  # another process holds it
    NONE = "none"  # the file system has no locks


def take(file: IO[Any], unguarded: str, *, shared: bool = False, wait: bool = False) -> Lock:
    """Lock an open file.

    Args:
        unguarded: what can go wrong without the lock, and what to do about it. Where the file system has no locks, a
            warning says so once per process.
        shared: let other processes share the lock.
        wait: wait until no other process holds the lock, rather than return BUSY.

    Raises:
        OSError: the file cannot be locked for another reason.
    """
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return Lock.BUSY
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if unguarded not in _warned:
            _warned.add(unguarded)
            print(
                f"warning: {file.name}: the file system has no locks ({error.strerror}): {unguarded}", file=sys.stderr
            )
        return Lock.NONE
    return Lock.HELD
