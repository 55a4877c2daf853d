"""Files of intermediate state that a stage reads back after an interruption: atomic, and preceded by a checksum.

Published outputs need no checksum of their own, since their manifest has one.
"""

import hashlib
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.stores.files import atomic

_DIGEST = 64  # bytes of a hex sha256


def write(path: Path, payload: bytes | memoryview) -> None:
    """Write ``payload`` atomically, preceded by its sha256."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(hashlib.sha256(payload).hexdigest().encode())
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
