"""Match the references of a tag file, such as paths, URLs and names of uploads, with the photos there are."""

import difflib
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import unquote

from pipeline.data.tags.annotations import Reference

_SUFFIX = re.compile(r"\.(?:jpe?g|jpe|jfif|png|bmp|tiff?|webp|gif|hei[cf]|avif|jp2|p[gpn]m)$", re.IGNORECASE)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")
_LOCAL_FILE = re.compile(r"[?&]d=([^&#]*)")  # Label Studio's local files: /data/local-files/?d=PATH
_UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")  # Label Studio's prefix of uploaded files
_WINDOW = 400  # names around a word's place in the alphabet that are compared with it


def has_suffix(name: str) -> bool:
    """Whether a name ends as that of a photo does, in any format."""
    return bool(_SUFFIX.search(name))


def cleaned(reference: str) -> str:
    """The path in a reference: with '/', in NFC, without a URL's host and query, '.', '..' and empty parts."""
    text = reference.strip()
    if local := _LOCAL_FILE.search(text):
        text = unquote(local[1])
    elif (url := _URL.match(text)) or text.startswith("/data/upload/"):
        text = unquote(re.split(r"[?#]", text[url.end() if url else 0 :])[0])
    text = unicodedata.normalize("NFC", text.replace("\\", "/"))
    return "/".join(part for part in text.split("/") if part not in ("", ".", ".."))


def _bare(path: str) -> str:
    return _SUFFIX.sub("", path)


def _caseless(path: str) -> str:
    return unicodedata.normalize("NFC", _bare(path).casefold())


def _safe(path: str) -> str:
    """As web applications rename uploads: anything but letters, digits, '-' and '.' becomes '_'."""
    return "/".join(re.sub(r"[^\w.-]|_", "_", part) for part in _caseless(path).split("/"))


def _without_prefix(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return folder + slash + _UPLOAD.sub("", name, count=1)


_Form = Callable[[str], str]
# From strict to loose: how a photo's path and how a reference are written to be compared
_FORMS: tuple[tuple[_Form, _Form], ...] = (
    (str, str),
    (_bare, _bare),
    (_caseless, _caseless),
    (_caseless, lambda path: _caseless(unquote(path))),
    (_caseless, lambda path: _caseless(_without_prefix(path))),
    (_safe, lambda path: _safe(_without_prefix(path))),
)


@dataclass(frozen=True)
class Match:
    """The photos that a reference may mean, one unless it is ambiguous, and how many of its folders were dropped."""

    photos: tuple[str, ...]
    dropped: int


class Photos:
    """Finds photos by reference.

    Args:
        photos: the path of each photo below the photos' folder, by id.
    """

    def __init__(self, photos: Mapping[str, str]) -> None:
        self._paths = {name: cleaned(path) for name, path in photos.items()}
        self._tails: list[dict[str, set[str]]] = []
        self._whole: list[dict[str, set[str]]] = []

    def find(self, reference: Reference) -> Match | None:
        """Find the photo of a reference by its path, or by as much of its end as is unique.

        Folders in front are dropped one after the other. At each step an exact match counts before one with another
        suffix, in another case, or without the prefix of an upload.
        """
        if isinstance(reference, int):
            photo = self._by_number.get(reference)
            return Match((photo,), 0) if photo is not None else self.find(_voc_id(reference))
        ambiguous = None
        for dropped, tail in enumerate(_tails(cleaned(reference))):
            for level, (_, form) in enumerate(_FORMS):
                key = form(tail)
                self._prepare(level)
                for index in (self._whole[level], self._tails[level]):
                    if len(photos := index.get(key, ())) == 1:
                        return Match(tuple(photos), dropped)
                    if photos:
                        ambiguous = ambiguous or Match(tuple(sorted(photos)), dropped)
        return ambiguous

    def knows(self, reference: str) -> bool:
        """Whether a text is likely to name a photo."""
        return bool(reference) and self.find(reference) is not None

    def nearest(self, reference: Reference) -> list[str]:
        """The one or two most similar ids."""
        return self._names.like(str(reference))

    @cached_property
    def _names(self) -> "Nearest":
        return Nearest(self._paths)

    @cached_property
    def _by_number(self) -> dict[int, str]:
        """Ids by the number that their digits form ('2007_000032', '000000000139'); those that are unique."""
        names: dict[int, list[str]] = {}
        for name, path in self._paths.items():
            digits = _bare(path).rpartition("/")[2]
            if re.fullmatch(r"[0-9_]{1,18}", digits) and digits.strip("_"):
                names.setdefault(int(digits.replace("_", "")), []).append(name)
        return {number: same[0] for number, same in names.items() if len(same) == 1}

    def _prepare(self, level: int) -> None:
        """Build the indices up to ``level``: of whole paths, and of their ends."""
        while len(self._tails) <= level:
            form = _FORMS[len(self._tails)][0]
            whole: dict[str, set[str]] = {}
            tails: dict[str, set[str]] = {}
            for name, path in self._paths.items():
                for number, tail in enumerate(_tails(path)):
                    (whole if number == 0 else tails).setdefault(form(tail), set()).add(name)
            self._whole.append(whole)
            self._tails.append(tails)


class Nearest:
    """Finds similar names by the last part of their paths. It compares those whose starts or ends are alike."""

    def __init__(self, names: Iterable[str]) -> None:
        keys = [(_last(name), name) for name in names]
        self._forward = sorted(keys)
        self._backward = sorted((key[::-1], name) for key, name in keys)

    def like(self, name: str) -> list[str]:
        """The one or two most similar names."""
        word = _last(name)
        keys: dict[str, str] = {}
        for names, key, step in ((self._forward, word, 1), (self._backward, word[::-1], -1)):
            at = bisect_left(names, (key, ""))
            for text, choice in names[max(0, at - _WINDOW) : at + _WINDOW]:
                keys.setdefault(text[::step], choice)
        return [keys[close] for close in difflib.get_close_matches(word, list(keys), 2)]


def _last(name: str) -> str:
    return _caseless(_without_prefix(cleaned(name).rpartition("/")[2]))[:200]


def _tails(path: str) -> Iterator[str]:
    """The path, then the path without its first folder, and so on."""
    while path:
        yield path
        _, slash, path = path.partition("/")
        if not slash:
            return


def _voc_id(number: int) -> str:
    """VOC's name of a number (2007000032 -> '2007_000032'); other numbers stay."""
    digits = str(number)
    return f"{digits[:4]}_{digits[4:]}" if re.fullmatch("20[0-9]{8}", digits) else digits
