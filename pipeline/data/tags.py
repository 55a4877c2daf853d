"""Image lists and image-level tags, in the forms in which people and the field's public code keep them."""

import csv
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

from pipeline.data import cls_labels
from pipeline.data.faults import Faults, hint

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Tags:
    """Sorted class ids in 1..K by image id, and in words where they come from."""

    of: dict[str, tuple[int, ...]]
    source: str


def image_id(name: str) -> str:
    """'a/b/x.jpg' -> 'x'; a name without an image's suffix keeps its dots."""
    path = PurePosixPath(name)
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name


def read_list(path: Path, faults: Faults) -> list[str]:
    """Image ids in the list's order: the first word of each line, be it an id or a path.

    So plain VOC lists, psa's '/JPEGImages/ID.jpg /SegmentationClassAug/ID.png' and 'ID c1 c2 ...' all do.
    """
    text = _text(path, "image list", faults)
    seen: dict[str, int] = {}
    for number, line in enumerate((text or "").splitlines(), 1):
        if line.strip():
            name = image_id(line.split()[0])
            if name in seen:
                where = f"lines {seen[name]} and {number}"
                faults.add("image listed twice", f"{path}: {name} stands twice ({where}); remove one")
            seen.setdefault(name, number)
    if text is not None and not seen:
        faults.add("empty list", f"{path}: names no image; write one image id a line")
    return list(seen)


def read_tags(path: Path, classes: Sequence[str], ids: Collection[str], faults: Faults) -> Tags:
    """Read a tag file, or a folder of VOC annotations, by its kind; what is wrong in it is added to ``faults``.

    =============  ============================================================================================
    ``.json``      {image id: [class, ...]}; a class is an id in 1..K or a name, here and in ``.csv``
    ``.csv``       header ``filename,tags``; tags separated by space, ';' or ','
    ``.txt``       lines ``ID c1 c2 ...`` with class ids counted FROM ZERO (DRS's and OAA-PyTorch's lists), or names
    ``.npy``       psa's and irn's cls_labels.npy (``pipeline.data.cls_labels``)
    a folder       ``ID.xml`` in VOC's form; an object marked difficult counts, as it does in cls_labels.npy
    =============  ============================================================================================

    Args:
        ids: the images whose annotations are read from a folder; files are read and checked whole.
    """
    resolver = _Resolver(path, classes, faults)
    if path.is_dir():
        _read_folder(path, ids, resolver)
        source = f"{path.name}/*.xml (objects, difficult ones included)"
    elif path.suffix == ".npy":
        _read_npy(path, resolver)
        source = f"{path.name} (pickled dict of class vectors)"
    elif path.suffix in _READERS:
        text = _text(path, "tag file", faults)
        if text is not None:
            _READERS[path.suffix](text, resolver)
        source = path.name
    else:
        faults.add("tag file", f"{path}: no tag file; give a .json, .csv, .txt or .npy file, or a folder of VOC XML")
        source = path.name
    return Tags(resolver.tags, source)


class _Resolver:
    """From words to class ids, image by image."""

    def __init__(self, path: Path, classes: Sequence[str], faults: Faults) -> None:
        self.path = path
        self.count = len(classes)
        self.names = {name: class_id for class_id, name in enumerate(classes, 1)}
        self.faults = faults
        self.tags: dict[str, tuple[int, ...]] = {}

    def fault(self, kind: str, text: str) -> None:
        self.faults.add(kind, f"{self.path}: {text}")

    def add(self, name: str, words: Iterable[Any], first: int = 1) -> None:
        """Tag an image with ``words``, each a name or an id; ids count from ``first``."""
        if name in self.tags:
            self.fault("image tagged twice", f"{name} stands twice; remove one")
        self.tags[name] = tuple(sorted({self._class_id(name, word, first) for word in words}))

    def _class_id(self, name: str, word: Any, first: int) -> int:
        """1..K, or 0 for a word that was found at fault."""
        if isinstance(word, str) and word in self.names:
            return self.names[word]
        if isinstance(word, str) and re.fullmatch(r"-?[0-9]+", word):
            word = int(word)
        if isinstance(word, int) and not isinstance(word, bool):
            if first <= word < first + self.count:
                return word - first + 1
            ids = f"{first}..{first + self.count - 1}"
            self.fault("class id out of range", f"{name} has class id {word}, but ids are {ids} here; correct it")
            return 0
        mend = hint(str(word), self.names, "correct it, or add it to dataset.classes")
        self.fault("unknown tag", f"{name} has the unknown tag {word!r}; {mend}")
        return 0


def _text(path: Path, what: str, faults: Faults) -> str | None:
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        faults.add(what, f"{path}: cannot be read as {what} ({error.strerror}); correct its path in params.yaml")
    except UnicodeDecodeError:
        faults.add(what, f"{path}: is not UTF-8 text; save it as UTF-8")
    return None


def _read_json(text: str, resolver: _Resolver) -> None:
    try:
        pairs = json.loads(text, object_pairs_hook=list)  # a dict would hide an image that stands twice
    except ValueError as error:
        resolver.fault("tag file", f"is not JSON ({error}); correct it")
        return
    if not text.lstrip().startswith("{"):
        resolver.fault("tag file", "must be a mapping {image id: [class, ...]}")
        return
    for key, words in pairs:
        if isinstance(words, list):
            resolver.add(image_id(key), words)
        else:
            resolver.fault("tags of an image", f"the tags of {key} must be a list, not {words!r}")


def _read_csv(text: str, resolver: _Resolver) -> None:
    rows = csv.reader(text.splitlines())
    header = [cell.strip().lower() for cell in next(rows, [])]
    if header != ["filename", "tags"]:
        resolver.fault("tag file", f"the first line must be 'filename,tags', not {','.join(header)!r}")
        return
    for row in rows:
        if any(cell.strip() for cell in row):
            words = ",".join(row[1:])  # tags separated by commas need no quotes
            resolver.add(image_id(row[0].strip()), _split(words, resolver.names))


def _split(cell: str, names: Collection[str]) -> list[str]:
    """Tags of a cell. Spaces separate only where nothing else does and the cell is not itself a name with spaces."""
    if re.search("[;,]", cell):
        return [word.strip() for word in re.split("[;,]", cell) if word.strip()]
    return [cell.strip()] if cell.strip() in names else cell.split()


def _read_txt(text: str, resolver: _Resolver) -> None:
    for line in text.splitlines():
        if line.strip():
            name, *words = line.split()
            resolver.add(image_id(name), words, first=0)


_READERS = {".json": _read_json, ".csv": _read_csv, ".txt": _read_txt}


def _read_npy(path: Path, resolver: _Resolver) -> None:
    try:
        vectors = cls_labels.load(path)
    except OSError as error:
        resolver.fault("tag file", f"cannot be read as tag file ({error.strerror}); correct its path in params.yaml")
        return
    except ValueError as error:
        resolver.fault("tag file", f"{error}; give the tags as .json or .csv")
        return
    for name, vector in vectors.items():
        if vector.size != resolver.count:
            text = f"{name} has {vector.size} values for {resolver.count} classes; correct dataset.classes"
            resolver.fault("length of a class vector", text)
        else:
            resolver.add(name, [int(column) + 1 for column in (vector > 0).nonzero()[0]])


def _read_folder(folder: Path, ids: Iterable[str], resolver: _Resolver) -> None:
    for name in ids:
        file = folder / f"{name}.xml"
        try:
            objects = ElementTree.parse(file).getroot().findall("object")
        except FileNotFoundError:
            continue  # an image without tags; the index says so
        except (OSError, ElementTree.ParseError) as error:
            resolver.faults.add("annotation", f"{file}: cannot be read ({error}); restore it")
            continue
        resolver.add(name, [(entry.findtext("name") or "").strip() for entry in objects])
