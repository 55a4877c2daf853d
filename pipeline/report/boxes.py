"""The boxes of objects in the report: their localization accuracy and pictures of true and drawn boxes."""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from pipeline.data.index import Image
from pipeline.report.gallery import Chip, Gallery, GalleryRow, Heading, Picture, subject
from pipeline.report.metrics import Metrics, Scores
from pipeline.report.pictures import Pixels, data_uri, read_photo

BoxImages = Mapping[
    str, Mapping[str, Any]
]  # true boxes, highest classes and drawn boxes by image id; see box_scores.py
PREFIX = "box_scores/"
COLUMNS = {
    "top_1_localization": "top-1 loc.",
    "top_5_localization": "top-5 loc.",
    "known": "GT-known",
    "max_box_accuracy": "MaxBoxAccV2",
    "top_1_classification": "top-1 class",
    "top_5_classification": "top-5 class",
}
TRUE, RIGHT, WRONG = (230, 30, 30), (40, 190, 60), (250, 160, 30)  # RGB
LEGEND = {
    "true box": TRUE,
    "box of the highest class, which is right": RIGHT,
    "box of the highest class, which is wrong": WRONG,
}


def read(files: Mapping[str, Any]) -> dict[str, BoxImages]:
    """Key the contents of boxes.json by block; ``files`` are keyed by reference."""
    return {name.removeprefix(PREFIX): content["images"] for name, content in files.items()}


def scored(scores: Scores) -> Scores:
    """The scores of boxes by block, of those that were scored on any image."""
    boxed = {name.removeprefix(PREFIX): values for name, values in scores.items() if name.startswith(PREFIX)}
    return {name: values for name, values in boxed.items() if values["images"]}


def metrics(scores: Scores) -> Metrics:
    """The localization accuracy of each block, as 'boxes/NAME', in [0, 1], with the number of images."""
    return {
        f"boxes/{name}": {"images": values["images"], **{key: values[key] for key in COLUMNS}}
        for name, values in scored(scores).items()
    }


def table(scores: Scores) -> dict[str, dict[str, str]]:
    """The table's texts by block and heading, in percent."""
    rows = {}
    for name, values in scores.items():
        numbers = {title: f"{100 * values[key]:.1f}" for key, title in COLUMNS.items()}
        at = values["max_box_accuracy_at"].items()
        best = ", ".join(
            f"IoU {overlap}: {100 * found['accuracy']:.1f} at {found['threshold']:.2f}" for overlap, found in at
        )
        rows[name] = {"images": str(values["images"]), **numbers, "best thresholds": best}
    return rows


def text_table(boxed: Metrics) -> str:
    """Format ``metrics`` as text in percent."""
    heading = "  boxes (%)"
    width = max(len(heading), *(len(name) + 2 for name in boxed))
    lines = [heading.ljust(width) + "".join(f"{title:>13}" for title in ("images", *COLUMNS.values()))]
    for name, values in boxed.items():
        numbers = [f"{values['images']:.0f}", *(f"{100 * values[key]:.1f}" for key in COLUMNS)]
        lines.append(f"  {name}".ljust(width) + "".join(f"{number:>13}" for number in numbers))
    return "\n".join(lines)


def gallery(images: Sequence[Image], drawn: Mapping[str, BoxImages], names: Sequence[str]) -> Gallery:
    """Draw the true box and that of the highest class for each image and block. ``names``: class names by id."""
    rows = []
    for image in images:
        photo = read_photo(image)
        pictures = [_picture(image, photo, boxes[image.id], block, names) for block, boxes in drawn.items()]
        rows.append(GalleryRow(subject(image, photo, names), None, pictures))
    legend = [Chip(name, f"rgb{colour}") for name, colour in LEGEND.items()]
    return Gallery(legend, False, [Heading("Boxes", block) for block in drawn], rows)


def _picture(image: Image, photo: Pixels, found: Mapping[str, Any], block: str, names: Sequence[str]) -> Picture:
    highest = str(found["highest"][0])
    out = photo.copy()
    factor = np.array([photo.shape[1] / image.width, photo.shape[0] / image.height] * 2)

    def draw(box: Sequence[float], colour: tuple[int, int, int]) -> None:
        left, top, right, bottom = np.rint(np.array(box) * factor).astype(int).tolist()
        cv2.rectangle(out, (left, top), (right - 1, bottom - 1), (255, 255, 255), 4)
        cv2.rectangle(out, (left, top), (right - 1, bottom - 1), colour, 2)

    for boxes in found["truth"].values():
        for box in boxes:
            draw(box, TRUE)
    if (box := found["boxes"][highest]) is not None:
        draw(box, RIGHT if highest in found["truth"] else WRONG)
    alt = f"boxes of {block} in {image.id}; its highest class is {names[int(highest)]}"
    return Picture(data_uri(out, lossless=False), alt)
