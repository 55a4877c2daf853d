"""Reader of image lists, in common formats and those of the field's public code."""

import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from pipeline.data.faults import Faults
from pipeline.data.text import read_text

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def image_id(name: str) -> str:
    """Strip folders, also those of Windows, and an image suffix: 'a/b/x.jpg' -> 'x'. Other names keep their dots."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name


def read_list(path: Path, faults: Faults, images: Collection[str] = ()) -> list[str]:
    """Read image ids in list order: each line starts with an id or a path.

    This covers plain VOC lists, psa's '/JPEGImages/ID.jpg /SegmentationClassAug/ID.png', and 'ID c1 c2 ...'. Faults are
    added to ``faults``.

    Args:
        images: ids of the image files. An id that contains spaces is recognized if it is among them.
    """
    text = read_text(path, "image list", faults)
    seen: dict[str, int] = {}
    for number, line in enumerate((text or "").split("\n"), 1):
        if line := line.strip():
            end = name_end(line, images)
            name = image_id(line[:end])
            if images and name not in images and any(map(_WORD.fullmatch, line[end:].split())):
                name = image_id(line)  # not a class id or a mask: the missing file's name contains spaces
            if name in seen:
                where = f"lines {seen[name]} and {number}"
                faults.add("image listed twice", f"{path}: {name} is listed twice ({where}); remove one")
            seen.setdefault(name, number)
    if text is not None and not seen:
        faults.add("empty list", f"{path}: names no image; write one image id a line")
    return list(seen)


_MOST_WORDS = 64  # of a file name
_WORD = re.compile(r"(?!-?[0-9]+$)[^/\\]+")


def name_end(line: str, images: Collection[str]) -> int:
    """Position at which the name of an image ends in a line of a list; the first field unless ``images`` has more.

    A name ends with an image suffix, or with the last field at which it is one of ``images``.
    """
    ends = [match.end() for match, _ in zip(re.finditer(r"\S+", line), range(_MOST_WORDS), strict=False)]
    files = [end for end in ends if line[:end].lower().endswith(IMAGE_SUFFIXES)]
    known = (end for end in (*files, *reversed(ends)) if image_id(line[:end]) in images)
    return next(known, (files or ends)[0])
