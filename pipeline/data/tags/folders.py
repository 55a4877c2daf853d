"""Folders with tags: VOC's XML, labelme's JSON, exports of Roboflow and CVAT, and a folder a class."""

import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from pipeline.data.tags import xml_files
from pipeline.data.tags.annotations import Annotations
from pipeline.data.tags.matching import Photos, has_suffix
from pipeline.data.tags.names import ClassNames
from pipeline.data.text import decode
from pipeline.stores.files import read_regular

# Files that hold the tags of all photos beside them, by the tools that write them
EXPORTS = ("_classes.csv", "_annotations.coco.json", "_annotations.csv", "annotations.xml")
_SPLIT = re.compile(r"train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?|eval(?:uation)?|images")


def files_below(folder: Path, out: Annotations) -> list[str]:
    """Paths below a folder, with '/', without hidden entries; a folder that links reach twice is walked once."""
    seen: set[tuple[int, int]] = set()
    files: list[str] = []

    def failed(error: OSError) -> None:
        where = error.filename or folder
        out.faults.add("tag file", f"{where}: cannot be listed ({error.strerror}); correct its permissions")

    for top, folders, names in os.walk(folder, followlinks=True, onerror=failed):
        status = os.stat(top)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefix = "" if (relative := os.path.relpath(top, folder)) == "." else f"{relative}/"
        files += [prefix + name for name in sorted(names) if not name.startswith(".")]
    return files


def exports(files: Sequence[str]) -> list[str]:
    """The files of one tool that hold the tags of the folders they lie in."""
    for name in EXPORTS:
        if found := [file for file in files if PurePosixPath(file).name.casefold() == name]:
            return found
    return []


def read(
    folder: Path,
    files: Sequence[str],
    photos: Photos,
    wanted: Collection[str],
    names: ClassNames | None,
    out: Annotations,
) -> None:
    """Read a folder by what it holds: XML of VOC or JSON of labelme, a file an image; or class folders of photos.

    Args:
        files: paths below the folder.
        wanted: ids of the photos whose annotations are read.
        names: the classes. If they are unknown, the first folder below the top that is not named after a split, such
            as 'train', counts as a class.
    """
    for suffix, read_file, kind in (
        (".xml", _voc, "VOC XML, difficult objects included"),
        (".json", _labelme, "labelme JSON"),
    ):
        annotations = [file for file in files if file.lower().endswith(suffix)]
        if annotations:
            out.kind = f"{kind}, a file an image"
            _read_files(folder, annotations, photos, wanted, read_file, out)
            return
    pictures = [file for file in files if has_suffix(file)]
    out.kind, out.joins, out.joins_photos = "a folder a class", True, True
    for file in pictures:
        if name := _class_folder(PurePosixPath(file).parts[:-1], names):
            out.add(file, [name])
    if not out.entries:
        kinds = "annotations (.xml, .json) nor photos in folders named after classes"
        out.fault("tag file", f"holds neither {kinds}; name a file or folder with tags")


def _class_folder(parts: Sequence[str], names: ClassNames | None) -> str | None:
    known = next((part for part in reversed(parts) if names and len(names.ids(part)) == 1), None)
    return known or next((part for part in parts if not _SPLIT.fullmatch(part.casefold())), None)


def _read_files(
    folder: Path,
    files: Sequence[str],
    photos: Photos,
    wanted: Collection[str],
    read_file: Callable[[bytes], tuple[str, list[str]]],
    out: Annotations,
) -> None:
    """Read the annotations of the wanted photos: by the name of the file, and then by the name in it."""
    lacking = set(wanted)
    others: list[str] = []
    for file in files:
        match = photos.find(os.path.splitext(file)[0])
        if match is None:
            others.append(file)
        elif lacking.intersection(match.photos) or set(match.photos) <= set(wanted):
            try:
                _, tags = read_file(read_regular(folder / file))
            except xml_files.ERRORS as error:
                line = f"{folder / file}: cannot be read ({error}); restore it, or save it as UTF-8"
                out.faults.add("annotation", line)
                lacking.difference_update(match.photos)
                continue
            out.add(os.path.splitext(file)[0], tags)
            lacking.difference_update(match.photos)
    for file in others if lacking else ():
        with suppress(*xml_files.ERRORS):  # it may belong to no photo
            name, tags = read_file(read_regular(folder / file))
            match = photos.find(name) if name else None
            if match and lacking.intersection(match.photos):
                out.add(name, tags)


def _voc(data: bytes) -> tuple[str, list[str]]:
    root = xml_files.parse(data)
    return xml_files.filename(root), xml_files.objects(root)


def _labelme(data: bytes) -> tuple[str, list[str]]:
    try:
        content = json.loads(decode(data)[0])
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise ValueError("not labelme's JSON, which has shapes")
    labels = [shape.get("label") for shape in content["shapes"] if isinstance(shape, dict)]
    flags = content.get("flags")
    labels += [name for name, set_ in flags.items() if set_ is True] if isinstance(flags, dict) else []
    path = content.get("imagePath")
    return path if isinstance(path, str) else "", [label for label in labels if isinstance(label, str)]
