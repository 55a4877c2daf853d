"""Readers of image-level tags, in common formats and those of the field's public code."""

import codecs
import csv
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pipeline.data import cls_labels
from pipeline.data.faults import Faults, hint
from pipeline.data.lists import image_id, name_end
from pipeline.data.text import read_text
from pipeline.stores import isolated
from pipeline.stores.files import read_regular


@dataclass(frozen=True)
class Tags:
    """Sorted class ids in 1..K by image id, and a description of their source."""

    by_image: dict[str, tuple[int, ...]]
    source: str


def read_tags(path: Path, classes: Sequence[str], ids: Collection[str], faults: Faults) -> Tags:
    """Read a tag file or a folder of VOC annotations; faults are added to ``faults``.

    =============  ============================================================================================
    ``.json``      {image id: [class, ...]}; a class is an id in 1..K or a name (also in ``.csv``)
    ``.csv``       header ``filename,tags``; tags separated by spaces, ';' or ','; no line break within quotes
    ``.txt``       lines ``ID c1 c2 ...`` with class ids FROM ZERO (as in DRS's and OAA-PyTorch's lists) or names
    ``.npy``       psa's and irn's cls_labels.npy (``pipeline.data.cls_labels``)
    a folder       ``ID.xml`` in VOC format and any encoding; difficult objects count, as in cls_labels.npy
    =============  ============================================================================================

    Args:
        ids: the listed images. Only their annotations are read from a folder, and numbers in a ``.npy`` file and names
            with spaces in a ``.txt`` file are matched with them. Tag files are always read and checked completely.
    """
    resolver = _Resolver(path, classes, faults)
    if os.path.isdir(path):
        _read_folder(path, ids, resolver)
        source = f"{path.name}/*.xml (objects, difficult ones included)"
    elif path.suffix == ".npy":
        _read_npy(path, ids, resolver)
        source = f"{path.name} (pickled dict of class vectors)"
    elif path.suffix in _READERS:
        text = read_text(path, "tag file", faults)
        if text is not None:
            _READERS[path.suffix](text, frozenset(ids), resolver)
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
        if isinstance(tag, str) and re.fullmatch(r"-?[0-9]{1,18}", tag):
            tag = int(tag)
        if isinstance(tag, int) and not isinstance(tag, bool):
            if first_id <= tag < first_id + self.count:
                return tag - first_id + 1
            ids = f"{first_id}..{first_id + self.count - 1}"
            self.fault("class id out of range", f"{name} has class id {tag}, but ids are {ids} here; correct it")
            return 0
        known_type = isinstance(tag, str | int | float) or tag is None
        kind = "mapping" if isinstance(tag, _Pairs) else type(tag).__name__
        text = repr(tag) if known_type else f"(a {kind}); write a class name or id"
        fix = hint(str(tag), self.names, "correct it, or add it to dataset.classes") if known_type else ""
        self.fault("unknown tag", f"{name} has the unknown tag {text}{'; ' if fix else ''}{fix}")
        return 0


class _Pairs(list[tuple[str, Any]]):
    """A JSON mapping as pairs, since a dict would hide duplicate images."""


def _read_json(text: str, ids: Collection[str], resolver: _Resolver) -> None:
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs)
    except ValueError as error:
        resolver.fault("tag file", f"is not JSON ({error}); correct it")
        return
    except RecursionError:
        resolver.fault("tag file", "is nested too deep; it must be a mapping {image id: [class, ...]}")
        return
    if not isinstance(pairs, _Pairs):
        resolver.fault("tag file", "must be a mapping {image id: [class, ...]}")
        return
    for key, tags in pairs:
        if isinstance(tags, list) and not isinstance(tags, _Pairs):
            resolver.add(image_id(key), tags)
        else:
            kind = "a mapping" if isinstance(tags, _Pairs) else repr(tags)
            resolver.fault("tags of an image", f"the tags of {key} must be a list, not {kind}")


def _read_csv(text: str, ids: Collection[str], resolver: _Resolver) -> None:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:  # line by line, so that an unclosed quote does not swallow the rest of the file
            rows += [row for row in csv.reader([line], strict=True) if any(cell.strip() for cell in row)]
        except csv.Error as error:
            resolver.fault("line of a CSV file", f"line {number} is not CSV ({error}); correct its quotes")
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if header != ["filename", "tags"]:
        resolver.fault("tag file", f"the first line must be 'filename,tags', not {','.join(header)!r}")
        return
    for row in rows[1:]:
        cell = ",".join(row[1:])  # tags separated by commas need no quotes
        resolver.add(image_id(row[0].strip()), _split(cell, resolver.names))


def _split(cell: str, names: Collection[str]) -> list[str]:
    """Split a cell into tags at ';' and ',', or at spaces without these. A class name may contain separators itself."""
    parts = re.split("([;,])", cell) if re.search("[;,]", cell) else re.split(r"(\s+)", cell)
    longest = max((len(re.findall(r"[;,]|\s+", name)) for name in names), default=0)
    tags = []
    at = 0
    while at < len(parts):
        ends = range(min(len(parts), at + 1 + 2 * longest), at, -1)  # parts and separators alternate
        end = next((end for end in ends if "".join(parts[at:end]).strip() in names), at + 1)
        tag = "".join(parts[at:end]).strip()
        tags += [tag] if tag else []
        at = end if end % 2 == 0 else end + 1
    return tags


def _read_txt(text: str, ids: Collection[str], resolver: _Resolver) -> None:
    for line in text.split("\n"):
        if line := line.strip():
            end = name_end(line, ids)
            resolver.add(image_id(line[:end]), _split(line[end:].strip(), resolver.names), first_id=0)


_READERS = {".json": _read_json, ".csv": _read_csv, ".txt": _read_txt}


def _read_npy(path: Path, ids: Iterable[str], resolver: _Resolver) -> None:
    try:
        vectors = isolated.call(cls_labels.load, path)
    except OSError as error:
        resolver.fault("tag file", f"cannot be read as tag file ({error.strerror}); correct its path in params.yaml")
        return
    except (ValueError, isolated.Failed) as error:
        resolver.fault("tag file", f"{error}; provide the tags as .json or .csv")
        return
    by_number = _by_number(ids)
    for key, vector in vectors.items():
        name = image_id(key) if isinstance(key, str) else by_number.get(key) or _voc_id(key)
        if vector.size != resolver.count:
            text = f"{name} has {vector.size} values for {resolver.count} classes; correct dataset.classes"
            resolver.fault("length of a class vector", text)
        else:
            resolver.add(name, [int(column) + 1 for column in (vector > 0).nonzero()[0]])


def _by_number(ids: Iterable[str]) -> dict[int, str]:
    """Ids by the number that their digits form ('2007_000032', '000000000139'); those that are unique."""
    names: dict[int, list[str]] = {}
    for name in ids:
        if re.fullmatch(r"[0-9_]{1,18}", name) and name.strip("_"):
            names.setdefault(int(name.replace("_", "")), []).append(name)
    return {number: same[0] for number, same in names.items() if len(same) == 1}


def _voc_id(number: int) -> str:
    """VOC's name of a number (2007000032 -> '2007_000032'); other numbers stay."""
    digits = str(number)
    return f"{digits[:4]}_{digits[4:]}" if re.fullmatch("20[0-9]{8}", digits) else digits


def _read_folder(folder: Path, ids: Iterable[str], resolver: _Resolver) -> None:
    for name in ids:
        file = folder / f"{name}.xml"
        try:
            objects = _parse_xml(read_regular(file)).findall("object")
        except FileNotFoundError:
            continue  # untagged; build_index reports it if it needs tags
        except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
            resolver.faults.add("annotation", f"{file}: cannot be read ({error}); restore it, or save it as UTF-8")
            continue
        resolver.add(name, [(entry.findtext("name") or "").strip() for entry in objects])


# Encodings that tools declare although they write supersets, as in the WHATWG Encoding Standard.
_SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949", "ascii": "utf-8"}
_ENCODING = re.compile(rb"""\s*<\?xml[^>]*?encoding\s*=\s*["']([^"'>]*)["']""")


def _parse_xml(data: bytes) -> ElementTree.Element:
    """Parse XML in any encoding that Python knows; expat itself knows no multi-byte encodings but Unicode's.

    Raises:
        LookupError: the declared encoding is unknown.
        ValueError: the file is not text in its encoding.
        ElementTree.ParseError: the file is not XML, or it defines entities, which may expand without bounds.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = data.decode("utf-16")
    elif data[:2] in (b"<\0", b"\0<"):
        text = data.decode("utf-16-le" if data[:1] == b"<" else "utf-16-be")
    else:
        declared = _ENCODING.match(data.removeprefix(codecs.BOM_UTF8))
        name = declared[1].decode("ascii", "replace") if declared and not data.startswith(codecs.BOM_UTF8) else "utf-8"
        encoding = codecs.lookup(name).name
        if encoding.startswith(("utf-16", "utf-32")):  # false: the declaration was read as bytes
            encoding = "utf-8"
        text = data.decode(_SUPERSETS.get(encoding, encoding)).removeprefix("\ufeff")
    if "<!ENTITY" in text:
        raise ElementTree.ParseError("it defines entities")
    return ElementTree.fromstring(text)
