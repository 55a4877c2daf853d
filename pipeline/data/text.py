"""Reader of text files that users supply, in the encodings that editors and spreadsheets write."""

import codecs
from pathlib import Path

from pipeline.data.faults import Faults
from pipeline.stores.files import read_regular

_MARKS = (  # UTF-32's mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_NAMES = {"utf-8": "UTF-8", "utf-8-sig": "UTF-8", "utf-16": "UTF-16", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16"}
_OTHERS = {  # first bytes of files that are mistaken for text
    b"PK\x03\x04": "a ZIP file or a spreadsheet (.xlsx, .ods); save the sheet as CSV, or unpack it",
    b"\xd0\xcf\x11\xe0": "an Excel workbook (.xls); save the sheet as CSV",
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"%PDF": "a PDF file; save its content as CSV",
}


def decode(data: bytes) -> tuple[str, str]:
    """Decode text and return it, with '\\n' for any line break, and the name of its encoding.

    A byte order mark decides. Otherwise UTF-16 is recognized by its zero bytes, UTF-8 by its validity; all other text
    is read as Windows-1252, the superset of Latin-1.

    Raises:
        ValueError: the bytes are not text; the message says what they are.
    """
    for start, what in _OTHERS.items():
        if data.startswith(start):
            raise ValueError(f"is {what}")
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None) or _utf16_without_mark(data)
    try:
        text = data.decode(encoding or "utf-8")
        name = _NAMES.get(encoding or "utf-8", (encoding or "").upper())
    except UnicodeDecodeError as error:
        if encoding:
            raise ValueError(f"is damaged: its start announces {encoding}, but {error.reason}; save it again") from None
        if data.count(0) or len(data.translate(None, _CONTROLS)) < len(data):
            raise ValueError("is not text; name a text file") from None
        text, name = data.decode("cp1252", "replace"), "Windows-1252"
    return text.replace("\r\n", "\n").replace("\r", "\n"), name


_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1a\x1b"))


def _utf16_without_mark(data: bytes) -> str | None:
    """UTF-16 if nearly every second byte of the start is zero, as in Western text."""
    start = data[:4096]
    if len(start) < 4 or len(data) % 2:
        return None
    for offset, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if start[offset::2].count(0) > 0.7 * len(start) / 2 and start[1 - offset :: 2].count(0) == 0:
            return name
    return None


def read_text(path: Path, kind: str, faults: Faults) -> str | None:
    """Read and ``decode`` a text file; None, and a fault, if it cannot be read.

    Args:
        kind: what the file is, for messages.
    """
    data = read_bytes(path, kind, faults)
    try:
        return None if data is None else decode(data)[0]
    except ValueError as error:
        faults.add(kind, f"{path}: {error}")
    return None


def read_bytes(path: Path, kind: str, faults: Faults) -> bytes | None:
    """Read a file; None, and a fault, if it cannot be read."""
    try:
        return read_regular(path)
    except OSError as error:
        faults.add(kind, f"{path}: cannot be read as {kind} ({error.strerror}); correct its path in params.yaml")
    except ValueError as error:  # NUL in the path
        faults.add(kind, f"{path}: cannot be read as {kind} ({error}); correct its path in params.yaml")
    return None
