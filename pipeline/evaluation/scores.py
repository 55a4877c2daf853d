"""Scores of a stage's output as a mapping for JSON, with stable keys."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.evaluation import confusion
from pipeline.evaluation.confusion import ConfusionMatrix, Counts, Ratios
from pipeline.evaluation.maps import THRESHOLDS, HalfMaximum, ThresholdSweep

RESAMPLES, SEED = 1000, 0  # of the intervals
# Background scores of the papers' codes: fixed, or the range in which the code sweeps on ground truth
PAPERS: dict[str, float | tuple[float, float]] = {"irn": 0.15, "amr": 0.2, "seam": (0.0, 0.59), "edam": (0.4, 0.58)}


def label_scores(matrix: ConfusionMatrix, names: Sequence[str]) -> dict[str, Any]:
    """Scores of label maps that may contain ignored pixels. ``names``: K+1 class names, background first."""
    return {
        **_matrix_scores(matrix.matrix(), names),
        "ignored": matrix.ignored,
        "miou_ignored_as_background": float(confusion.mean(confusion.iou(matrix.matrix(ignored_as_background=True)))),
        "miou_as": matrix.conventions(),
    }


def prediction_scores(matrix: ConfusionMatrix, names: Sequence[str]) -> dict[str, Any]:
    """Scores of a segmentation network's predictions; a predicted 255 counts as background.

    ``miou_low`` and ``miou_high`` bound the 95 % interval over resamples of the images (``confusion.bootstrap``).
    """
    low, high = confusion.bootstrap(matrix.images(), RESAMPLES, SEED)
    counts = matrix.matrix(ignored_as_background=True)
    return {
        **_matrix_scores(counts, names),
        "miou_low": low,
        "miou_high": high,
        "miou_as": matrix.conventions(),
        "all_background_miou": confusion.all_background_miou(counts),
        "confusion": counts,
    }


def map_scores(half: HalfMaximum, sweep: ThresholdSweep, names: Sequence[str]) -> dict[str, Any]:
    """Scores of maps. Keys with ``best_threshold`` are chosen on ground truth: an upper bound, not a result.

    ``miou_at`` holds the mIoU at the background score of each paper's public code. SEAM's and EDAM's are the best of
    the range ``swept``, which is chosen on ground truth as well. All maps are divided by their own maximum.
    """
    recall, noise, miou = half.recall(), half.noise(), sweep.miou()
    best = int(np.argmax(miou))
    return {
        "recall": confusion.mean(recall),
        "recall_per_class": _named(recall, names[1:]),
        "noise": confusion.mean(noise),
        "noise_per_class": _named(noise, names[1:]),
        "coverage": half.coverage(),
        "best_threshold": best / THRESHOLDS,
        "best_threshold_miou": miou[best],
        "best_threshold_iou": _named(confusion.iou(sweep.matrices()[best]), names),
        "miou_at": {paper: _at(miou, threshold) for paper, threshold in PAPERS.items()},
        "sweep": {"threshold": np.arange(THRESHOLDS) / THRESHOLDS, "miou": miou},
    }


def jsonable(value: Any) -> Any:
    """Convert to JSON types: arrays to lists, floats rounded to 6 decimals, NaN and infinity to None."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return round(float(value), 6) if math.isfinite(value) else None
    return value


def _matrix_scores(counts: Counts, names: Sequence[str]) -> dict[str, Any]:
    iou = confusion.iou(counts)
    return {
        "miou": confusion.mean(iou),
        "iou": _named(iou, names),
        "absent": [name for name, value in zip(names, iou, strict=True) if np.isnan(value)],
        "absent_from_masks": [name for name, pixels in zip(names, counts.sum(1), strict=True) if not pixels],
        "pixel_accuracy": confusion.pixel_accuracy(counts),
        "class_accuracy": _named(confusion.class_accuracy(counts), names),
    }


def _at(miou: Ratios, threshold: float | tuple[float, float]) -> dict[str, Any]:
    """The mIoU at a background score, or at the best one of a range; both ends belong to it."""
    if isinstance(threshold, float):
        return {"threshold": threshold, "miou": miou[round(threshold * THRESHOLDS)]}
    first, last = (round(end * THRESHOLDS) for end in threshold)
    best = first + int(np.argmax(miou[first : last + 1]))
    return {"swept": list(threshold), "threshold": best / THRESHOLDS, "miou": miou[best]}


def _named(values: Ratios, names: Sequence[str]) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))
