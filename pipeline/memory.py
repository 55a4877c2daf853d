"""Free memory; and its shortage, on the CPU or a GPU, as a fault that names the cause and the fix."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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


def available(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that this process and its children can still use.

    This is what the machine has free, or what is left within the limit of a control group (of a container or a SLURM
    job), whichever is less. Cached files count as free. Without /proc, memory is unlimited.
    """
    free = [sys.maxsize]
    with suppress(OSError, StopIteration, ValueError):
        lines = (proc / "meminfo").read_text().splitlines()
        free.append(next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                free += _left(cgroups, path, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
                free += _left(cgroups / "memory", path, limit, usage, "total_inactive_file")
    return max(0, min(free))


def _left(root: Path, path: str, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    """Bytes left in a control group and in those that contain it. A container may see its own group as the root."""
    folder = root / path.lstrip("/")
    for group in (folder, *folder.parents):
        if not group.is_relative_to(root):
            return
        with suppress(OSError, ValueError):  # no such group here; 'max' is no number
            most = int((group / limit).read_text())
            cached = [
                int(line.split()[1])
                for line in (group / "memory.stat").read_text().splitlines()
                if line.startswith(f"{reclaimable} ")
            ]
            yield most - int((group / usage).read_text()) + sum(cached)
