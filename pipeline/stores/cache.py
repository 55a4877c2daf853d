"""Small caches that only save time: they may be lost, damaged or read-only, and two processes may write one at once."""

import hashlib
import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.stores.files import read_regular


def load(path: Path) -> Any:
    """Return the JSON content of a cache; None if it is missing or damaged. Its first line is the rest's sha256."""
    try:
        checksum, _, content = read_regular(path).partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != checksum:
            return None
        return json.loads(content)
    except (OSError, ValueError, RecursionError):
        return None


def save(path: Path, value: Any) -> None:
    """Write a cache atomically if its folder can be written to.

    Of two processes that save at the same time, one may lose its entries, which costs it the time to find them again.
    """
    content = json.dumps(value, separators=(",", ":")).encode()
    temporary = path.with_name(f"{path.name}-{os.getpid()}-{threading.get_ident()}.partial")
    with suppress(OSError):
        try:
            temporary.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
