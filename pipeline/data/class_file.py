"""Reader of the class file: the names of classes 1..K, one a line."""

import re
from pathlib import Path

from pipeline.data.checks import IGNORE
from pipeline.data.faults import Faults
from pipeline.data.voc import CLASSES
from pipeline.stores.files import read_regular

_BACKGROUND = ("background",)
_IGNORED = ("ignore", "void")  # labelme's and VOC's names of pixels without a class
_LABEL_MAP = re.compile(r"# *label:color|[^:]*:\d+,\d+,\d+:")  # CVAT's labelmap.txt


def read_classes(root: Path, classes: str, faults: Faults) -> list[str]:
    """Read the names of classes 1..K: VOC's, or those of a text file with one name per line.

    Tools also write the background, which has id 0, as the first name, and labelme '__ignore__' before it. Both are
    left out. Faults are added to ``faults``.
    """
    if classes == "voc":
        return list(CLASSES)
    path = root / classes
    try:
        text = read_regular(path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        faults.add("classes", f"{path}: cannot be read ({error}); write one class name a line, or set dataset.classes")
        return []
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if any(map(_LABEL_MAP.match, names)):
        faults.add("classes", f"{path}: is CVAT's label map, not a list of names; write one class name a line")
        return []
    names = names[_count_before_first(names) :]
    if not 0 < len(names) < IGNORE:
        faults.add("classes", f"{path}: names {len(names)} classes; there must be 1 to {IGNORE - 1}, one a line")
    if len(set(names)) < len(names):
        twice = ", ".join(sorted({name for name in names if names.count(name) > 1}))
        faults.add("classes", f"{path}: names {twice} more than once; remove the duplicates")
    for name in names:
        if _plain(name) in _BACKGROUND:
            line = f"{path}: names {name}, which is always class 0, after other classes"
            faults.add("classes", f"{line}; list only object classes, in the order of their ids")
        elif _plain(name) in _IGNORED:
            line = f"{path}: names {name}, but pixels without a class have the id {IGNORE} in masks"
            faults.add("classes", f"{line}; list only object classes, or rename this one")
    return names


def _count_before_first(names: list[str]) -> int:
    """Number of names before class 1: none, the background, or 'ignore' and the background."""
    kinds = [_plain(name) for name in names[:2]]
    if kinds[:1] and kinds[0] in _BACKGROUND:
        return 1
    return 2 if len(kinds) == 2 and kinds[0] in _IGNORED and kinds[1] in _BACKGROUND else 0


def _plain(name: str) -> str:
    """Lower case without the underscores and brackets around names such as '_background_' and '<void>'."""
    return name.strip("_-<>[]() ").lower()
