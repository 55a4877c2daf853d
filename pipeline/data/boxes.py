"""Reader of ``dataset.boxes``: the boxes of objects in the evaluation images, against which drawn boxes are scored."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.faults import Faults, hint
from pipeline.errors import one_line
from pipeline.stores.files import read_regular

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels; right and bottom are exclusive
ROUNDING = 1.0  # pixels by which a box may exceed its image; it is cut off
KIND = "box"


def read_boxes(
    path: Path,
    images: Mapping[str, Mapping[str, Any]],
    tags: Mapping[str, Sequence[int]],
    num_classes: int,
    faults: Faults,
) -> dict[str, list[list[float]]]:
    """Read the boxes of the images: {"ID": [[class id, left, top, width, height], ...]} in pixels of the file.

    Entries of other images are ignored. Each image needs a box, whose class is one of its tags.

    Args:
        images: entry in the index (``pipeline.data.index``) of each image by id.
        tags: class ids of each image.

    Returns:
        [class id, left, top, right, bottom] of each box by image id, in pixels of the working size.
    """
    try:
        raw = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        line = f"{path}: cannot be read ({one_line(str(error))}); correct it, or set dataset.boxes to null"
        faults.add(KIND, line)
        return {}
    if not isinstance(raw, dict):
        faults.add(KIND, f"{path}: must be a mapping of image ids to boxes; correct it, or set dataset.boxes to null")
        return {}
    found: dict[str, list[list[float]]] = {}
    for name, entry in images.items():
        boxes = raw.get(name)
        if not isinstance(boxes, list) or not boxes:
            fix = hint(name, (key for key in raw if key not in images), "add one, or unlist the image")
            faults.add("image without a box", f"{path}: has no box of the evaluation image {name}; {fix}")
            continue
        if "height" not in entry:
            continue  # the image cannot be read, which is a fault of its own
        found[name] = []
        for box in boxes:
            if wrong := _fault(box, entry, tags.get(name, ()), num_classes):
                faults.add(KIND, f"{path}: {name}: the box {one_line(json.dumps(box))} {wrong}; correct it")
            else:
                found[name].append(_working(box, entry))
    return found


def _fault(box: Any, entry: Mapping[str, Any], tags: Sequence[int], num_classes: int) -> str:
    """Say what is wrong with a box; '' if nothing is."""
    if not isinstance(box, list) or len(box) != 5 or not all(isinstance(value, int | float) for value in box):
        return "is not [class id, left, top, width, height]"
    class_id, *sides = box
    if class_id not in range(1, num_classes + 1):
        return f"has a class id that is not in 1..{num_classes}"
    if class_id not in tags:
        return "has a class that is not among the tags of the image"
    height, width = entry.get("file_size", (entry["height"], entry["width"]))
    return outside(sides, width, height)


def outside(sides: Sequence[float], width: int, height: int) -> str:
    """Say what is wrong with left, top, width and height of a box in an image of this size; '' if nothing is."""
    left, top, wide, high = sides
    if not all(map(math.isfinite, sides)) or wide <= 0 or high <= 0:
        return "has no area"
    least, most = min(left, top), max(left + wide - width, top + high - height)
    return f"lies outside of its image of {width}x{height} pixels" if least < -ROUNDING or most > ROUNDING else ""


def _working(box: Sequence[float], entry: Mapping[str, Any]) -> list[float]:
    """Cut a box off at the rim of its image, and scale it to the working size."""
    class_id, left, top, wide, high = box
    height, width = entry.get("file_size", (entry["height"], entry["width"]))
    x, y = entry["width"] / width, entry["height"] / height
    right, bottom = min(left + wide, width), min(top + high, height)
    return [int(class_id), max(0, left) * x, max(0, top) * y, right * x, bottom * y]
