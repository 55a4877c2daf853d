"""Advisory file locks between processes, with a fallback for file systems without them (some Lustre and NFS mounts).

The kernel releases a lock when its process ends for any reason. Every lock of the project is taken here. HDF5's own
locking is disabled (``stores.raster``): a store is written under a temporary name and never changes afterwards.
"""

import errno
import fcntl
import sys
from enum import Enum
from typing import IO, Any

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_warned: set[str] = set()


class Lock(Enum):
    """Outcome of ``take``."""

    HELD = "held"  # by this process, until it closes the file or ends
    BUSY = "busy"  # another process holds it
    NONE = "none"  # the file system has no locks


def take(file: IO[Any], unguarded: str, *, shared: bool = False, wait: bool = False) -> Lock:
    """Try to lock an open file.

    Args:
        unguarded: warning for file systems without locks, printed once per process: what can go wrong without the
            lock, and how to avoid it.
        shared: let other processes share the lock.
        wait: block until the lock is free instead of returning BUSY.

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
