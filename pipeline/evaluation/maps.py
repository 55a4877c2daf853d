"""How well attention and localization maps cover objects: recall and noise, coverage, best-threshold mIoU.

Maps are scored at the size of the mask: upsampled bilinearly, then divided by their own maximum.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.confusion import IGNORE, Counts, Labels, Ratios, iou, mean, ratio

THRESHOLDS = 100  # background scores tried: 0, 0.01, ... 0.99 (SEAM ends at 0.59, where walked maps are still rising)
TIE = 1e-4  # of a hundredth: 0.3 in float32 is no more than the threshold 0.3


@dataclass(frozen=True)
class Scored:
    """An image's N pixels with ground truth. ``target``: (N,) class ids; ``values``: (n, N) of the n ``classes``."""

    target: Labels
    classes: NDArray[np.intp]
    values: NDArray[np.float32]


def prepare(ground_truth: Labels, maps: Mapping[int, NDArray[np.uint8]]) -> Scored:
    """Bring an image's maps (class id -> h x w uint8) to its H x W mask; a map of zeros stays zero."""
    height, width = ground_truth.shape
    valid = ground_truth != IGNORE
    values = np.empty((len(maps), int(valid.sum())), np.float32)
    for row, raster in enumerate(maps.values()):
        resized = cv2.resize(raster.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        values[row] = resized[valid] / max(float(resized.max()), 1e-5)
    return Scored(ground_truth[valid], np.array(list(maps), np.intp), values)


class HalfMaximum:
    """Maps cut at half of their maximum (OAA Sec. 4.3), against masks.

    Pixels are pooled over the set, class by class. A class that is in the mask but has no map is not discovered.
    """

    def __init__(self, num_classes: int) -> None:
        self._target = np.zeros(num_classes + 1, np.int64)  # pixels of the class
        self._claimed = np.zeros(num_classes + 1, np.int64)  # pixels that maps of the class claim
        self._found = np.zeros(num_classes + 1, np.int64)  # pixels that are both

    def update(self, image: Scored) -> None:
        """Add an image."""
        size = len(self._target)
        self._target += np.bincount(image.target, minlength=size)
        for class_id, values in zip(image.classes, image.values, strict=True):
            claimed = np.bincount(image.target[values >= 0.5], minlength=size)
            self._claimed[class_id] += claimed.sum()
            self._found[class_id] += claimed[class_id]

    def recall(self) -> Ratios:
        """(K,) share of each object class's pixels that its maps discover; NaN for an absent class."""
        return ratio(self._found, self._target)[1:]

    def noise(self) -> Ratios:
        """(K,) share of the pixels claimed that are not of the class: 1 - precision; NaN where nothing is claimed."""
        return ratio(self._claimed - self._found, self._claimed)[1:]

    def coverage(self) -> float:
        """Share of all object pixels that the map of their class discovers (OAA Fig. 11); NaN where there are none."""
        return float(ratio(self._found[1:].sum(), self._target[1:].sum()))


class ThresholdSweep:
    """mIoU of the maps' argmax against a constant background score, for all thresholds from one pass of counts.

    A pixel takes the class of its highest value where that is above the threshold, and background elsewhere. How many
    thresholds it passes is one number between 0 and 100, so that (target, class, number) is counted once and the
    confusion matrix of any threshold is a cumulative sum.
    """

    def __init__(self, num_classes: int) -> None:
        self._shape = (num_classes + 1, num_classes + 1, THRESHOLDS + 1)
        self._counts = np.zeros(self._shape, np.int64)

    def update(self, image: Scored) -> None:
        """Add an image."""
        winner = np.zeros(len(image.target), np.intp)
        value = np.zeros(len(image.target), np.float32)
        for class_id, values in zip(image.classes, image.values, strict=True):
            winner[values > value] = class_id
            np.maximum(value, values, out=value)
        passed = np.clip(np.ceil(value * THRESHOLDS - TIE), 0, THRESHOLDS).astype(np.intp)
        cell = (image.target * np.intp(self._shape[1]) + winner) * self._shape[2] + passed
        self._counts += np.bincount(cell, minlength=self._counts.size).reshape(self._shape)

    def matrices(self) -> Counts:
        """(100, K+1, K+1) confusion matrices, one a threshold."""
        total = self._counts.sum(axis=2)
        failed = self._counts.cumsum(axis=2)[..., :THRESHOLDS]  # passed number <= threshold: background
        matrices: Counts = np.moveaxis(total[..., None] - failed, 2, 0)
        matrices[:, :, 0] += np.moveaxis(failed.sum(axis=1), 1, 0)
        return matrices

    def miou(self) -> Ratios:
        """(100,) mIoU at the thresholds 0, 0.01, ... 0.99."""
        return mean(iou(self.matrices()))
