"""Reader of text files that users supply."""

from pathlib import Path

from pipeline.data.faults import Faults
from pipeline.stores.files import read_regular


def read_text(path: Path, kind: str, faults: Faults) -> str | None:
    """Decode a UTF-8 file, with '\\n' for any line break."""
    try:
        text = read_regular(path).decode("utf-8-sig")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        faults.add(kind, f"{path}: cannot be read as {kind} ({error.strerror}); correct its path in params.yaml")
    except UnicodeDecodeError:
        faults.add(kind, f"{path}: is not UTF-8 text; save it as UTF-8")
    except ValueError as error:  # NUL in the path
        faults.add(kind, f"{path}: cannot be read as {kind} ({error}); correct its path in params.yaml")
    return None
