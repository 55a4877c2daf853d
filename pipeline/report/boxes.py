"""The boxes of objects in the report: their localization accuracy and pictures of true and drawn boxes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import cv2
import numpy as np

from pipeline.data.index import Image
from pipeline.report import seeds
from pipeline.report.gallery import Chip, Gallery, GalleryRow, Heading, Picture, subject
from pipeline.report.metrics import Scores
from pipeline.report.pictures import Pixels, data_uri, read_photo
from pipeline.report.seeds import Runs
from pipeline.report.tables import Number, number

# True boxes, highest classes and drawn boxes by image id; see box_scores.py
BoxImages = Mapping[str, Mapping[str, Any]]
PREFIX = "box_scores/"
COLUMNS = {
    "top_1_localization": "top-1 loc.",
    "top_5_localization": "top-5 loc.",
    "known": "GT-known",
    "max_box_accuracy": "MaxBoxAccV2",
    "top_1_classification": "top-1 class",
    "top_5_classification": "top-5 class",
}
SWEPT = "max_box_accuracy_at"  # the best threshold and its accuracy, by IoU
RANGED = "known"  # the score whose range over several seeds is printed
CELL = 15  # width of a number in the text table, in characters
TRUE, RIGHT, WRONG = (230, 30, 30), (40, 190, 60), (250, 160, 30)  # RGB
PUBLISHED = {  # in percent
    "CAM": {"top_1_localization": 41.46, "top_5_localization": 51.36},
    "OAA": {"top_1_localization": 56.23, "top_5_localization": 69.68},
}
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


def accuracies(runs: Runs) -> Runs:
    """The same seeds, with the localization accuracy of each block as metrics, in [0, 1]."""
    return {
        seed: replace(
            run, metrics={name: {key: values[key] for key in COLUMNS} for name, values in scored(run.scores).items()}
        )
        for seed, run in runs.items()
    }


def metrics(runs: Runs) -> dict[str, dict[str, Any]]:
    """The content of metrics.json for each block, as 'boxes/NAME': the number of images, and ``seeds.table``."""
    first = next(iter(runs.values()))
    images = {name: values["images"] for name, values in scored(first.scores).items()}
    return {
        f"boxes/{name}": {"images": images[name], **values} for name, values in seeds.table(accuracies(runs)).items()
    }


def table(runs: Runs) -> dict[str, dict[str, Number]]:
    """The table's cells by block and heading, in percent."""
    found, scores = accuracies(runs), [scored(run.scores) for run in runs.values()]
    rows = {}
    for name, values in seeds.means(found).items():
        numbers = {title: number(found, name, key, f"{100 * values[key]:.1f}") for key, title in COLUMNS.items()}
        best = "; ".join(_best(overlap, [each[name] for each in scores]) for overlap in scores[0][name][SWEPT])
        rows[name] = {"images": Number(str(scores[0][name]["images"])), **numbers, "best thresholds": Number(best)}
    return rows


def published() -> dict[str, dict[str, Number]]:
    """Return the rows of OAA Table 14, on CUB-200-2011 with VGG-16, as cells of ``table``."""
    empty = dict.fromkeys(["images", *COLUMNS.values(), "best thresholds"], Number("–"))
    return {
        f"published: {name}": {**empty, **{COLUMNS[key]: Number(f"{value:.2f}") for key, value in values.items()}}
        for name, values in PUBLISHED.items()
    }


def _best(overlap: str, scores: Sequence[Mapping[str, Any]]) -> str:
    """The mean accuracy at an IoU, and the threshold of each seed."""
    found = [each[SWEPT][overlap] for each in scores]
    thresholds = ", ".join(f"{each['threshold']:.2f}" for each in found)
    return f"IoU {overlap}: {100 * fmean(each['accuracy'] for each in found):.1f} at {thresholds}"


def text_table(boxed: Mapping[str, Mapping[str, Any]]) -> str:
    """Format ``metrics`` as text in percent. With several seeds, a last column holds the range of ``RANGED``."""
    several = any("least" in values for values in boxed.values())
    titles = ["images", *COLUMNS.values(), *([f"{COLUMNS[RANGED]} range"] if several else [])]
    heading = "  boxes (%)"
    width = max(len(heading), *(len(name) + 2 for name in boxed))
    lines = [heading.ljust(width) + "".join(f"{title:>{CELL}}" for title in titles)]
    for name, values in boxed.items():
        numbers = [f"{values['images']:.0f}", *(f"{100 * values[key]:.1f}" for key in COLUMNS)]
        numbers += [str(seeds.Range(values["least"][RANGED], values["most"][RANGED]))] if several else []
        lines.append(f"  {name}".ljust(width) + "".join(f"{text:>{CELL}}" for text in numbers))
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
