"""Score maps, label maps or predictions against masks, and write scores.json."""

import json
from collections.abc import Sequence
from typing import Any

from pipeline.config import stage_table
from pipeline.data.index import Image, Index
from pipeline.errors import PipelineError
from pipeline.evaluation.confusion import ConfusionMatrix
from pipeline.evaluation.maps import HalfMaximum, ThresholdSweep, prepare
from pipeline.evaluation.scores import jsonable, label_scores, map_scores, prediction_scores
from pipeline.stores.blocks import listed
from pipeline.stores.raster import RasterStore
from pipeline.workflow.stage import Work, progress, run

COVERAGE_IMAGES = 300  # only the first images with masks, since every epoch reads them all again


def main(work: Work) -> None:
    """Score the images of the split that have a mask. If there are none, write only ``images: 0``."""
    index = Index(work.inputs["index"])
    masks = RasterStore(work.inputs["ground_truth"])
    kind = stage_table.kind(work.job.name.split("/")[0])
    split = stage_table.KINDS[kind].split
    images = index.images(split).having(lambda name: name in masks and bool(masks.classes(name)))
    scores: dict[str, Any] = {"kind": kind, "split": split, "images": len(images), "classes": index.classes}
    scores["arithmetic"] = RasterStore(work.inputs["maps" if kind == "maps" else "labels"]).arithmetic
    if images and kind == "maps":
        scores |= score_maps(work, index, masks, images)
    elif images:
        scores |= score_labels(work, index, masks, images, kind)
    work.outputs["scores"].write_text(json.dumps(jsonable(scores), indent=1, sort_keys=True, allow_nan=False) + "\n")
    shown = ("recall", "noise", "best_threshold_miou", "miou", "ignored", "pixel_accuracy")
    summary = ", ".join(f"{name} {scores[name]:.4f}" for name in shown if name in scores) or "no masks to score against"
    print(f"{work.job.full_name} on {len(images)} {split} images: {summary}", flush=True)


def score_labels(work: Work, index: Index, masks: RasterStore, images: Sequence[Image], kind: str) -> dict[str, Any]:
    """Return mIoU and accuracy of the label maps, one per image."""
    store = RasterStore(work.inputs["labels"])
    _refuse_missing(store, [image for image in images if image.id not in store or not store.classes(image.id)])
    matrix = ConfusionMatrix(index.num_classes)
    for image in progress(images, work.job.label):
        try:
            matrix.update(masks.get(image.id), store.get(image.id))
        except ValueError as error:
            raise PipelineError(f"{store.path}: image {image.id}: {error}; run its stage again") from None
    score = prediction_scores if kind == "predictions" else label_scores
    return score(matrix, ["background", *index.classes])


def score_maps(work: Work, index: Index, masks: RasterStore, images: Sequence[Image]) -> dict[str, Any]:
    """Return recall, noise, the threshold sweep and, if the maps of every epoch were saved, coverage by epoch."""
    store = RasterStore(work.inputs["maps"])
    _refuse_missing(store, [image for image in images if image.tags and image.id not in store])
    half, sweep = HalfMaximum(index.num_classes), ThresholdSweep(index.num_classes)
    for image in progress(images, work.job.label):
        scored = prepare(masks.get(image.id), store.maps(image.id) if image.id in store else {})
        half.update(scored)
        sweep.update(scored)
    scores = map_scores(half, sweep, ["background", *index.classes])
    if "snapshots" in work.inputs:
        snapshots = RasterStore(work.inputs["snapshots"])
        scores["coverage_by_epoch"] = coverage_by_epoch(snapshots, index.num_classes, masks, images)
    return scores


def coverage_by_epoch(
    snapshots: RasterStore, num_classes: int, masks: RasterStore, images: Sequence[Image]
) -> dict[str, Any]:
    """Return the coverage of the cumulative attention after each epoch (OAA Fig. 11).

    Snapshots are keyed 'EPOCH/IMAGE'. An image without a snapshot in an epoch has no coverage yet.
    """
    epochs = sorted({int(key.split("/", 1)[0]) for key in snapshots})
    images = images[:COVERAGE_IMAGES] if epochs else []
    coverage = []
    for epoch in progress(epochs, "coverage by epoch"):
        half = HalfMaximum(num_classes)
        for image in images:
            key = f"{epoch}/{image.id}"
            half.update(prepare(masks.get(image.id), snapshots.maps(key) if key in snapshots else {}))
        coverage.append(half.coverage())
    return {"images": len(images), "epoch": epochs, "coverage": coverage}


def _refuse_missing(store: RasterStore, missing: list[Image]) -> None:
    if missing:
        named = listed([image.id for image in missing])
        raise PipelineError(f"{store.path}: lacks {len(missing)} images with masks ({named}); run its stage again")


if __name__ == "__main__":
    run("evaluation", main)
