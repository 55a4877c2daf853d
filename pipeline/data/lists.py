"""Reader of image lists, in common formats and those of the field's public code."""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from pipeline.data.faults import Faults
from pipeline.data.photos import SUFFIXES
from pipeline.data.text import read_text

_WORD = re.compile(r"(?!-?[0-9]+$)[^/\\]+")
_MOST_WORDS = 64  # of a file name


class Names:
    """Finds photos by what lists call them: an id, or a path with the folders around the photos' own or some of them.

    Args:
        photos: the path of each photo below the photos' folder, with suffix, by id.
    """

    def __init__(self, photos: Mapping[str, str]) -> None:
        self.ids = frozenset(photos)
        self.is_tree = any("/" in name for name in photos)
        self._by_path = {_normal(path): name for name, path in photos.items()}
        self._by_end: dict[str, list[str]] = {}  # ids by their ends that begin at a folder or at the name
        for name in photos:
            for end in _ends(name):
                self._by_end.setdefault(end, []).append(name)

    def exact(self, text: str) -> str | None:
        """The photo with this path below the photos' folder, or with this id."""
        path = _normal(text)
        if (name := self._by_path.get(path)) is not None:
            return name
        return next((name for name in (path, _without_suffix(path)) if name in self.ids), None)

    def find(self, text: str, spaces: bool = True) -> list[str]:
        """The photos that a path may mean: one, several if it is ambiguous, or none.

        Folders in front are dropped until the rest is ``exact``. A path of fewer folders than the photo has fits, too.

        Args:
            spaces: whether dropped folders may have spaces in their names.
        """
        path = _normal(text)
        for end in _ends(path):
            if (spaces or " " not in path[: len(path) - len(end)]) and (name := self.exact(end)) is not None:
                return [name]
        return self._by_end.get(path) or self._by_end.get(_without_suffix(path)) or []


def read_list(path: Path, faults: Faults, photos: Mapping[str, str] | None = None) -> list[str]:
    """Read image ids in list order: each line is an id or a path, or starts with one.

    This covers plain VOC lists, psa's '/JPEGImages/ID.jpg /SegmentationClassAug/ID.png', 'ID c1 c2 ...', and lists
    from Windows. A name that contains spaces is read whole if there is such a photo. Faults are added to ``faults``.

    Args:
        photos: the path of each photo below the photos' folder, by id; None if they are unknown. Then a name is the
            last part of a path, and ends with an image suffix or at the first space.
    """
    text = read_text(path, "image list", faults)
    names = None if photos is None else Names(photos)
    seen: dict[str, int] = {}
    for number, line in enumerate((text or "").split("\n"), 1):
        if not line.strip():
            continue
        several = _in_line(line, names)
        name = several[0]
        if len(several) > 1:
            fix = f"it may be {several[0]} or {several[1]}; write the path below the folder of the photos"
            faults.add("ambiguous image", f"{path}: line {number} names {line.strip()}, but {fix}")
        if name in seen:
            where = f"lines {seen[name]} and {number}"
            faults.add("image listed twice", f"{path}: {name} is listed twice ({where}); remove one")
        seen.setdefault(name, number)
    if text is not None and not seen:
        faults.add("empty list", f"{path}: names no image; write one image id a line")
    return list(seen)


def _in_line(line: str, names: Names | None) -> list[str]:
    """The photos that a line may name, at least one; a name without a photo is that of a missing one."""
    starts = list(_starts(line))
    files = [text for text in reversed(starts) if text.lower().endswith(SUFFIXES)]
    if names is not None:
        if (name := names.exact(line)) or (name := names.exact(starts[0])):
            return [name]
        tries = [(text, True) for text in files] + [(text, spaces) for spaces in (False, True) for text in starts]
        for text, spaces in tries:
            if several := names.find(text, spaces):
                return several
    name = (files or starts[-1:])[0]
    if names is not None and not files and any(map(_WORD.fullmatch, line.strip()[len(name) :].split())):
        name = line.strip()  # not a class id or a mask: the missing file's name contains spaces
    path = _without_suffix(_normal(name)) or name
    return [path if names is not None and names.is_tree else path.rpartition("/")[2]]


def _starts(line: str) -> Iterator[str]:
    """The line without spaces at its ends, then without its last word, and so on."""
    ends = [match.end() for match, _ in zip(re.finditer(r"\S+", line), range(_MOST_WORDS), strict=False)]
    for end in reversed(ends):
        yield line[:end].lstrip()


def _normal(path: str) -> str:
    """A path with '/', in NFC, without '.', '..' and empty parts."""
    text = unicodedata.normalize("NFC", path.replace("\\", "/"))
    return "/".join(part for part in text.split("/") if part not in ("", ".", ".."))


def _ends(path: str) -> Iterator[str]:
    """The path, then the path without its first folder, and so on."""
    while path:
        yield path
        path = path.partition("/")[2]


def _without_suffix(path: str) -> str:
    return str(PurePosixPath(path).with_suffix("")) if path.lower().endswith(SUFFIXES) else path
