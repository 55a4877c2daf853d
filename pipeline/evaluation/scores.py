"""Scores of a stage's output as a mapping for JSON, with stable keys."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.evaluation import confusion
from pipeline.evaluation.confusion import ConfusionMatrix, Counts, Ratios
from pipeline.evaluation.maps import THRESHOLDS, HalfMaximum, ThresholdSweep


def label_scores(matrix: ConfusionMatrix, names: Sequence[str]) -> dict[str, Any]:
    """Scores of label maps that may contain ignored pixels. ``names``: K+1 class names, background first."""
    return {
        **_matrix_scores(matrix.matrix(), names),
        "ignored": matrix.ignored,
        "miou_ignored_as_background": float(confusion.mean(confusion.iou(matrix.matrix(ignored_as_background=True)))),
    }


def prediction_scores(matrix: ConfusionMatrix, names: Sequence[str]) -> dict[str, Any]:
    """Scores of a segmentation network's predictions; a predicted 255 counts as background."""
    counts = matrix.matrix(ignored_as_background=True)
    return {
        **_matrix_scores(counts, names),
        "all_background_miou": confusion.all_background_miou(counts),
        "confusion": counts,
    }


def map_scores(half: HalfMaximum, sweep: ThresholdSweep, names: Sequence[str]) -> dict[str, Any]:
    """Scores of maps. Keys with ``best_threshold`` are chosen on ground truth: an upper bound, not a result."""
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
        "pixel_accuracy": confusion.pixel_accuracy(counts),
        "class_accuracy": _named(confusion.class_accuracy(counts), names),
    }


def _named(values: Ratios, names: Sequence[str]) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))
