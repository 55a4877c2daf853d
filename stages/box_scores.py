"""Draw boxes from the class maps of the evaluation images, and score them against true boxes.

boxes.json holds, for each scored image, its true boxes, its highest classes and the box of each class that has a map.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.config.views import BoxTest
from pipeline.data.index import Image, Index
from pipeline.errors import PipelineError
from pipeline.evaluation.boxes import HIGHEST, Boxes, BoxScores, mask_boxes
from pipeline.evaluation.scores import jsonable
from pipeline.stores.raster import RasterStore
from pipeline.workflow.stage import Work, progress, run


def main(work: Work) -> None:
    """Score the evaluation images that have true boxes. If there are none, write only ``images: 0``."""
    index = Index(work.inputs["index"])
    store, test = RasterStore(work.inputs["class_maps"]), work.job.block
    scored, highest = BoxScores(test.threshold), min(HIGHEST, index.num_classes)
    images: dict[str, Any] = {}
    boxed = Index(work.inputs["boxes"])
    for image, truth in true_boxes(work, index, boxed, test):
        if image.id not in store:
            raise PipelineError(f"{store.path}: lacks the image {image.id}; run its stage again")
        maps = store.maps(image.id)
        ranking = list(maps)[:highest]
        drawn = scored.update(image.size, maps, ranking, truth)
        images[image.id] = {
            "truth": {class_id: boxes.tolist() for class_id, boxes in truth.items()},
            "highest": ranking,
            "boxes": {class_id: box[0].tolist() if len(box) else None for class_id, box in drawn.items()},
        }
    scores: dict[str, Any] = {"images": len(images), "truth": describe(boxed, test), "arithmetic": store.arithmetic}
    scores |= {"threshold": test.threshold} | (scored.summary() if images else {})
    _write(work, "scores", jsonable(scores))
    _write(work, "boxes", jsonable({"images": images}))
    shown = ("top_1_localization", "top_5_localization", "known", "max_box_accuracy")
    summary = ", ".join(f"{name} {scores[name]:.4f}" for name in shown if name in scores) or "no boxes to score against"
    print(f"boxes/{work.job.name} on {len(images)} evaluation images: {summary}", flush=True)


def describe(boxed: Index, test: BoxTest) -> str:
    """Describe the true boxes for the report."""
    if len(boxed):
        return "dataset.boxes"
    if test.masks == "single":
        return "masks of single-object images"
    return "masks: one box around all pixels of each tagged class"


def true_boxes(work: Work, index: Index, boxed: Index, test: BoxTest) -> Iterator[tuple[Image, dict[int, Boxes]]]:
    """Yield the evaluation images that have true boxes, with these by class id.

    They come from ``dataset.boxes`` or else from the masks. Of a mask, only tagged classes count, since other classes
    may have no map.
    """
    masks = RasterStore(work.inputs["ground_truth"])
    for image in progress((boxed if len(boxed) else index).images("evaluation"), work.job.label):
        truth: dict[int, Boxes] = {}
        if image.boxes:
            for class_id in {int(box[0]): None for box in image.boxes}:
                truth[class_id] = np.array([box[1:] for box in image.boxes if box[0] == class_id])
        elif image.id in masks and masks.classes(image.id):
            truth = mask_boxes(masks.get(image.id), image.tags, test.masks == "single")
        if truth:
            yield image, truth


def _write(work: Work, name: str, values: Any) -> None:
    text = json.dumps(values, indent=None if name == "boxes" else 1, sort_keys=True, allow_nan=False)
    work.outputs[name].write_text(text + "\n")


if __name__ == "__main__":
    run("box_scores", main)
