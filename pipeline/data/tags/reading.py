"""Read a tag file or folder of any kind. The content shows the kind; the suffix only breaks ties."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from pipeline.data.faults import Faults
from pipeline.data.tags import folders, json_files, lines, tables, vectors, xml_files
from pipeline.data.tags.annotations import Annotations
from pipeline.data.tags.matching import Photos
from pipeline.data.tags.names import ClassNames
from pipeline.data.text import decode, read_bytes

_TABLES = (".csv", ".tsv")


def read(
    path: Path, photos: Photos, wanted: Collection[str], classes: Sequence[str] | None, faults: Faults
) -> Annotations:
    """Read tags of any kind; faults are added to ``faults``.

    Args:
        wanted: ids of the photos whose tags are of interest; other annotations of a folder are not read.
        classes: class names, if they are known.
    """
    out = Annotations(path, faults, path.name)
    if not os.path.isdir(path):
        _read_file(path, photos, out)
        return out
    files = folders.files_below(path, out)
    exported = folders.exports(files)
    if not exported:
        folders.read(path, files, photos, wanted, ClassNames(classes) if classes is not None else None, out)
    for file in exported:
        part = Annotations(path / file, faults, file)
        _read_file(path / file, photos, part)
        folder = os.path.dirname(file)
        out.kind, out.joins, out.first_id = f"{part.kind}, {os.path.basename(file)}", part.joins, part.first_id
        out.classes += [name for name in part.classes if name not in out.classes]
        out.remarks += [remark for remark in part.remarks if remark not in out.remarks]
        for reference, tags in part.entries.items():
            out.add(f"{folder}/{reference}" if folder else reference, tags)
    return out


def _read_file(path: Path, photos: Photos, out: Annotations) -> None:
    data = read_bytes(path, "tag file", out.faults)
    if data is None:
        return
    if data.startswith(b"\x93NUMPY") or path.suffix.lower() == ".npy":
        vectors.read(path, out)
        return
    if data.lstrip(b"\xef\xbb\xbf \t\r\n\0\xff\xfe").startswith(b"<") or path.suffix.lower() == ".xml":
        _read_xml(data, out)
        return
    try:
        text, encoding = decode(data)
    except ValueError as error:
        out.fault("tag file", str(error))
        return
    if text.lstrip()[:1] in ("{", "[") or path.suffix.lower() in (".json", ".jsonl"):
        if (value := json_files.parse(text, out)) is not None:
            json_files.read(value, photos, out)
    elif not text.strip():
        out.fault("tag file", "is empty; write a line for each photo, or name another file")
    else:
        delimiter = tables.delimiter_of(text, photos)
        if delimiter and (path.suffix.lower() in _TABLES or tables.is_table(text, delimiter, photos)):
            tables.read(text, delimiter, photos, out)
        else:
            lines.read(text, photos, out)
    if encoding != "UTF-8":
        out.kind += f", {encoding}"


def _read_xml(data: bytes, out: Annotations) -> None:
    try:
        root = xml_files.parse(data)
    except xml_files.ERRORS as error:
        out.fault("tag file", f"is not XML ({error}); restore it, or save it as UTF-8")
        return
    if root.tag == "annotations":
        xml_files.read_cvat(root, out)
    elif root.tag == "annotation":
        out.kind = "VOC XML of one image"
        out.add(xml_files.filename(root) or out.path.stem, xml_files.objects(root))
    else:
        out.fault("tag file", f"is XML with the root <{root.tag:.40}>; it must be of VOC or CVAT")
