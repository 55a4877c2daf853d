"""What a tag file says, before its references are matched with photos and its tags with classes."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.faults import Faults

Reference = str | int  # names a photo; a number only in cls_labels.npy
# Titles of columns and keys of records, without case, blanks, '_' and '-'
_PHOTO = re.compile(
    r"(?:image|img|photo|picture)?(?:file|path|file(?:name|path)|names?|id|url|uri)|filenames|images?|img|photo|picture"
    r"|datei|bild|foto|fichier|archivo|(?:file)?upload"
)
_TAG = re.compile(
    r"(?:(?:class|object|category)?labels?|class|category|object)(?:name)?|classes|classnames|categories|objects|tags?"
    r"|choices?|species|keywords?|annotations?|regions|shapes"
)


def key_of(title: str) -> str:
    """A column's title or a record's key, as it is compared with the usual ones."""
    return re.sub(r"[\s_-]+", "", title.casefold())


def titles_photos(title: str) -> bool:
    """Whether a column or key is named as those with photos usually are."""
    return bool(_PHOTO.fullmatch(key_of(title)))


def titles_tags(title: str) -> bool:
    """Whether a column or key is named as those with tags usually are."""
    return bool(_TAG.fullmatch(key_of(title)))


class Field(str):
    """Text that may hold several tags, such as a cell of a table."""

    __slots__ = ()


class Pairs(list[tuple[str, Any]]):
    """A JSON mapping as pairs, since a dict would hide duplicate keys."""


@dataclass
class Annotations:
    """The content of a tag file.

    Attributes:
        kind: what was recognized, for people.
        entries: the tags of each reference, as written: names, numbers, or a ``Field``. An empty list is an entry.
        classes: the class names that the file itself declares, in its order.
        first_id: the number of the first class, where tags are numbers.
        joins: whether several entries with one reference add up, as rows of objects do, or contradict each other.
        joins_photos: whether entries with several references to one photo add up, as copies in class folders do.
        widths: the length of the class vector of each reference, if the tags are positions in one.
    """

    path: Path
    faults: Faults
    kind: str
    joins: bool = False
    joins_photos: bool = False
    first_id: int = 1
    entries: dict[Reference, list[Any]] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    widths: dict[Reference, int] = field(default_factory=dict)

    def fault(self, kind: str, text: str) -> None:
        self.faults.add(kind, f"{self.path}: {text}")

    def add(self, reference: Reference, tags: Iterable[Any]) -> None:
        """Add the tags of a photo; a fault if it has some and they do not add up."""
        if reference in self.entries and not self.joins:
            self.fault("image tagged twice", f"{reference} is tagged twice; remove one")
        self.entries.setdefault(reference, []).extend(tags)


def as_field(text: str) -> list[Any]:
    """The tags in a cell or value: of lists as Python, pandas and JSON write them, and of plain text."""
    text = text.strip()
    if len(text) > 1 and (text[0], text[-1]) in (("[", "]"), ("{", "}"), ("(", ")")) and ":" not in text:
        quoted = re.findall(r"""'([^']*)'|"([^"]*)\"""", text)
        return [first or second for first, second in quoted] if quoted else [Field(text[1:-1])]
    return [Field(text)] if text else []


_TRUE = frozenset(("1", "1.0", "true", "yes", "y", "x", "t", "ja", "present"))
_FALSE = frozenset(("0", "0.0", "false", "no", "n", "", "f", "nein", "-", "nan", "none", "null", "absent"))


def truth(value: Any) -> bool | None:
    """Whether a cell of a class's column says that the class is present; None if it says something else."""
    if value is None or isinstance(value, bool):
        return bool(value)
    word = str(value).strip().casefold() if isinstance(value, str | int | float) else "?"
    return True if word in _TRUE else False if word in _FALSE else None
