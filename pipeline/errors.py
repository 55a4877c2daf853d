"""Faults that are reported to the user in one line, without a traceback."""

import errno
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SPACE = "free some space or raise the quota there, then run it again"
_PERMISSION = "correct its permissions or those of its folder, or choose another folder"
_FIXES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f) or use another file system",
    errno.EIO: "check the disk or the network file system",
    errno.ESTALE: "check the network file system, then run it again",
    errno.EROFS: "make the file system writable or choose another folder",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EBUSY: "end the process that uses it, or unmount it, then run it again",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs: the machine has too many open files",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def one_line(text: str) -> str:
    """Escape characters that do not print, such as line breaks and lone surrogates in user-supplied names."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as '1 photo' or '2 photos'."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class PipelineError(Exception):
    """A fault in the input that the user can fix.

    Each argument is one line that names the file or key, the fault and the fix. A stage prints each line as
    ``error: ...`` and exits with status 1. Any other exception is a bug and shows its traceback.
    """

    def __init__(self, *lines: str) -> None:
        self.lines = tuple(map(one_line, lines))
        super().__init__("\n".join(self.lines))

    def __reduce__(self) -> tuple[Any, ...]:
        return PipelineError, self.lines  # a worker's error keeps its lines


def warn(line: str) -> None:
    """Print a line to stderr that the user should see although the run goes on."""
    print(f"warning: {one_line(line)}", file=sys.stderr, flush=True)


@contextmanager
def exit_on_faults() -> Iterator[None]:
    """The frame of every command-line program: a PipelineError is printed to stderr, and the exit status is 1.

    If the reader of the output has ended (``| head``), the program ends silently with the status 141, as shells expect.
    """
    status: Any = None
    try:
        try:
            yield
        except PipelineError as error:
            status = 1
            for line in error.lines:
                print(f"error: {line}", file=sys.stderr)
        except SystemExit as end:
            status = end.code
        sys.stdout.flush()
    except BrokenPipeError:
        unread = [stream for stream in (1, 2) if _has_no_reader(stream)]
        if not unread:  # a pipe to another process broke
            raise
        for stream in unread:  # Python flushes both once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        status = status or 128 + signal.SIGPIPE
    if status is not None:
        sys.exit(status)


def _has_no_reader(stream: int) -> bool:
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


@contextmanager
def disk_faults(folder: Path) -> Iterator[None]:
    """Turn errors of the disk, such as a full one, into PipelineError.

    Args:
        folder: named in the message if the error names no file, as that of a failed ``write`` does not.
    """
    try:
        yield
    except OSError as error:
        if (fix := _FIXES.get(error.errno or 0)) is None:
            raise
        file = folder if error.filename is None or isinstance(error.filename, int) else os.fsdecode(error.filename)
        raise PipelineError(f"{file}: {os.strerror(error.errno or 0)}; {fix}") from error
