"""Readers of image lists and image-level tags, in common formats and those of the field's public code."""

import csv
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

from pipeline.data import cls_labels
from pipeline.data.faults import Faults, hint
from pipeline.stores.files import read_regular

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Tags:
    """Sorted class ids in 1..K by image id, and a description of their source."""

    by_image: dict[str, tuple[int, ...]]
    source: str


def image_id(name: str) -> str:
    """Strip folders and an image suffix: 'a/b/x.jpg' -> 'x'. Other names keep their dots."""
    path = PurePosixPath(name)
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name


def read_list(path: Path, faults: Faults) -> list[str]:
    """Read image ids in list order: the first field of each line, either an id or a path.

    This covers plain VOC lists, psa's '/JPEGImages/ID.jpg /SegmentationClassAug/ID.png', and 'ID c1 c2 ...'. Faults are
    added to ``faults``.
    """
    text = _read_text(path, "image list", faults)
    seen: dict[str, int] = {}
    for number, line in enumerate((text or "").splitlines(), 1):
        if line.strip():
            name = image_id(line.split()[0])
            if name in seen:
                where = f"lines {seen[name]} and {number}"
                faults.add("image listed twice", f"{path}: {name} is listed twice ({where}); remove one")
            seen.setdefault(name, number)
    if text is not None and not seen:
        faults.add("empty list", f"{path}: names no image; write one image id a line")
    return list(seen)


def read_tags(path: Path, classes: Sequence[str], ids: Collection[str], faults: Faults) -> Tags:
    """Read a tag file or a folder of VOC annotations; faults are added to ``faults``.

    =============  ============================================================================================
    ``.json``      {image id: [class, ...]}; a class is an id in 1..K or a name (also in ``.csv``)
    ``.csv``       header ``filename,tags``; tags separated by spaces, ';' or ','
    ``.txt``       lines ``ID c1 c2 ...`` with class ids FROM ZERO (as in DRS's and OAA-PyTorch's lists) or names
    ``.npy``       psa's and irn's cls_labels.npy (``pipeline.data.cls_labels``)
    a folder       ``ID.xml`` in VOC format; difficult objects count, as in cls_labels.npy
    =============  ============================================================================================

    Args:
        ids: images whose annotations are read from a folder. Tag files are always read and checked completely.
    """
    resolver = _Resolver(path, classes, faults)
    if os.path.isdir(path):
        _read_folder(path, ids, resolver)
        source = f"{path.name}/*.xml (objects, difficult ones included)"
    elif path.suffix == ".npy":
        _read_npy(path, resolver)
        source = f"{path.name} (pickled dict of class vectors)"
    elif path.suffix in _READERS:
        text = _read_text(path, "tag file", faults)
        if text is not None:
            _READERS[path.suffix](text, resolver)
        source = path.name
    else:
        faults.add("tag file", f"{path}: not a tag file; use a .json, .csv, .txt or .npy file, or a folder of VOC XML")
        source = path.name
    return Tags(resolver.tags, source)


class _Resolver:
    """Converts the tags of each image, class names or ids, to class ids."""

    def __init__(self, path: Path, classes: Sequence[str], faults: Faults) -> None:
        self.path = path
        self.count = len(classes)
        self.names = {name: class_id for class_id, name in enumerate(classes, 1)}
        self.faults = faults
        self.tags: dict[str, tuple[int, ...]] = {}

    def fault(self, kind: str, text: str) -> None:
        self.faults.add(kind, f"{self.path}: {text}")

    def add(self, name: str, tags: Iterable[Any], first_id: int = 1) -> None:
        """Set the tags of an image, each a class name or an id; ``first_id`` is the id of the first class."""
        if name in self.tags:
            self.fault("image tagged twice", f"{name} is tagged twice; remove one")
        self.tags[name] = tuple(sorted({self._class_id(name, tag, first_id) for tag in tags}))

    def _class_id(self, name: str, tag: Any, first_id: int) -> int:
        """Class id in 1..K, or 0 after adding a fault."""
        if isinstance(tag, str) and tag in self.names:
            return self.names[tag]
        if isinstance(tag, str) and re.fullmatch(r"-?[0-9]+", tag):
            tag = int(tag)
        if isinstance(tag, int) and not isinstance(tag, bool):
            if first_id <= tag < first_id + self.count:
                return tag - first_id + 1
            ids = f"{first_id}..{first_id + self.count - 1}"
            self.fault("class id out of range", f"{name} has class id {tag}, but ids are {ids} here; correct it")
            return 0
        fix = hint(str(tag), self.names, "correct it, or add it to dataset.classes")
        self.fault("unknown tag", f"{name} has the unknown tag {tag!r}; {fix}")
        return 0


def _read_text(path: Path, kind: str, faults: Faults) -> str | None:
    try:
        return read_regular(path).decode("utf-8-sig")
    except OSError as error:
        faults.add(kind, f"{path}: cannot be read as {kind} ({error.strerror}); correct its path in params.yaml")
    except UnicodeDecodeError:
        faults.add(kind, f"{path}: is not UTF-8 text; save it as UTF-8")
    return None


def _read_json(text: str, resolver: _Resolver) -> None:
    try:
        pairs = json.loads(text, object_pairs_hook=list)  # a dict would hide duplicate images
    except ValueError as error:
        resolver.fault("tag file", f"is not JSON ({error}); correct it")
        return
    if not text.lstrip().startswith("{"):
        resolver.fault("tag file", "must be a mapping {image id: [class, ...]}")
        return
    for key, tags in pairs:
        if isinstance(tags, list):
            resolver.add(image_id(key), tags)
        else:
            resolver.fault("tags of an image", f"the tags of {key} must be a list, not {tags!r}")


def _read_csv(text: str, resolver: _Resolver) -> None:
    rows = csv.reader(text.splitlines())
    header = [cell.strip().lower() for cell in next(rows, [])]
    if header != ["filename", "tags"]:
        resolver.fault("tag file", f"the first line must be 'filename,tags', not {','.join(header)!r}")
        return
    for row in rows:
        if any(cell.strip() for cell in row):
            cell = ",".join(row[1:])  # tags separated by commas need no quotes
            resolver.add(image_id(row[0].strip()), _split(cell, resolver.names))


def _split(cell: str, names: Collection[str]) -> list[str]:
    """Split a cell into tags at ';' and ','; at spaces only without these and if the cell is not one class name."""
    if re.search("[;,]", cell):
        return [tag.strip() for tag in re.split("[;,]", cell) if tag.strip()]
    return [cell.strip()] if cell.strip() in names else cell.split()


def _read_txt(text: str, resolver: _Resolver) -> None:
    for line in text.splitlines():
        if line.strip():
            name, *tags = line.split()
            resolver.add(image_id(name), tags, first_id=0)


_READERS = {".json": _read_json, ".csv": _read_csv, ".txt": _read_txt}


def _read_npy(path: Path, resolver: _Resolver) -> None:
    try:
        vectors = cls_labels.load(path)
    except OSError as error:
        resolver.fault("tag file", f"cannot be read as tag file ({error.strerror}); correct its path in params.yaml")
        return
    except ValueError as error:
        resolver.fault("tag file", f"{error}; provide the tags as .json or .csv")
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
            objects = ElementTree.fromstring(read_regular(file)).findall("object")
        except FileNotFoundError:
            continue  # untagged; build_index reports it if it needs tags
        except (OSError, ElementTree.ParseError) as error:
            resolver.faults.add("annotation", f"{file}: cannot be read ({error}); restore it")
            continue
        resolver.add(name, [(entry.findtext("name") or "").strip() for entry in objects])
