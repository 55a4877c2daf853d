"""Files of intermediate state that a stage reads back after an interruption: atomic, and preceded by a checksum.

Published outputs need no checksum of their own, since their manifest has one.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pipeline.errors import PipelineError
from pipeline.stores.files import atomic

_DIGEST = 64  # bytes of a hex sha256


class Writer:
    """A file whose content is hashed as it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None  # that of the last failed write

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


@contextmanager
def writing(path: Path) -> Iterator[Writer]:
    """Yield a file for the payload of ``path``, which is written atomically and preceded by its sha256.

    Raises:
        OSError: the payload cannot be written, whatever exception a library has made of this.
    """
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(bytes(_DIGEST))
        writer = Writer(file)
        try:
            yield writer
        finally:
            if writer.error is not None:
                raise writer.error
        file.seek(0)
        file.write(writer.digest.hexdigest().encode())


def write(path: Path, payload: bytes | memoryview) -> None:
    """Write ``payload`` atomically, preceded by its sha256."""
    with writing(path) as file:
        file.write(payload)


def read(path: Path) -> memoryview:
    """Read the payload of ``path``.

    Raises:
        FileNotFoundError: the file does not exist.
        PipelineError: the checksum does not match, or the file cannot be read.
    """
    try:
        content = memoryview(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read ({error.strerror}); delete it to start over") from None
    expected, payload = bytes(content[:_DIGEST]).decode("latin-1"), content[_DIGEST:]
    actual = hashlib.sha256(payload).hexdigest()
    if actual != expected:
        raise PipelineError(f"{path}: damaged: sha256 is {actual}, expected {expected}; delete it to start over")
    return payload
