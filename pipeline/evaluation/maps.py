"""Quality of attention and localization maps: recall, noise, coverage and best-threshold mIoU.

Maps are upsampled bilinearly to the size of the mask and divided by their own maximum before scoring.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.confusion import IGNORE, Counts, Labels, Ratios, iou, mean, ratio

# Background scores 0, 0.01, ... 0.99. SEAM stops at 0.59, where the mIoU of random-walk maps is still rising.
THRESHOLDS = 100
TIE = 1e-4  # tolerance in units of 0.01, so that 0.3 in float32 does not exceed the threshold 0.3


@dataclass(frozen=True)
class MapPixels:
    """Maps of an image at its N pixels with ground truth.

    Attributes:
        target: (N,) ground-truth class ids.
        classes: (n,) class ids of the maps.
        values: (n, N) map values in [0, 1].
    """

    target: Labels
    classes: NDArray[np.intp]
    values: NDArray[np.float32]


def prepare(ground_truth: Labels, maps: Mapping[int, NDArray[np.uint8]]) -> MapPixels:
    """Resize and normalise an image's maps (class id -> h x w uint8) to its H x W mask; a zero map stays zero."""
    height, width = ground_truth.shape
    valid = ground_truth != IGNORE
    values = np.empty((len(maps), int(valid.sum())), np.float32)
    for row, raster in enumerate(maps.values()):
        resized = cv2.resize(raster.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        values[row] = resized[valid] / max(float(resized.max()), 1e-5)
    return MapPixels(ground_truth[valid], np.array(list(maps), np.intp), values)


class HalfMaximum:
    """Scores of maps thresholded at half of their maximum (OAA Sec. 4.3).

    Pixels of each class are pooled over all images. A class in the mask without a map counts as not discovered.
    """

    def __init__(self, num_classes: int) -> None:
        self._target = np.zeros(num_classes + 1, np.int64)  # ground-truth pixels of the class
        self._claimed = np.zeros(num_classes + 1, np.int64)  # pixels where its maps reach half of their maximum
        self._correct = np.zeros(num_classes + 1, np.int64)  # pixels in both

    def update(self, image: MapPixels) -> None:
        """Add an image."""
        size = len(self._target)
        self._target += np.bincount(image.target, minlength=size)
        for class_id, values in zip(image.classes, image.values, strict=True):
            claimed = np.bincount(image.target[values >= 0.5], minlength=size)
            self._claimed[class_id] += claimed.sum()
            self._correct[class_id] += claimed[class_id]

    def recall(self) -> Ratios:
        """(K,) share of each object class's pixels that its maps claim; NaN for an absent class."""
        return ratio(self._correct, self._target)[1:]

    def noise(self) -> Ratios:
        """(K,) 1 - precision: share of the claimed pixels that belong to other classes; NaN if none is claimed."""
        return ratio(self._claimed - self._correct, self._claimed)[1:]

    def coverage(self) -> float:
        """Share of all object pixels that the map of their class claims (OAA Fig. 11); NaN if there are none."""
        return float(ratio(self._correct[1:].sum(), self._target[1:].sum()))


class ThresholdSweep:
    """mIoU of the maps' argmax against a constant background score, for all thresholds in a single pass.

    A pixel takes the class of its highest value if that is above the threshold, else background. The number of
    thresholds that its value exceeds lies between 0 and 100. Counting pixels by (target, class, number) therefore
    gives the confusion matrix of every threshold as a cumulative sum.
    """

    def __init__(self, num_classes: int) -> None:
        self._shape = (num_classes + 1, num_classes + 1, THRESHOLDS + 1)
        self._counts = np.zeros(self._shape, np.int64)

    def update(self, image: MapPixels) -> None:
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
        """(100, K+1, K+1) confusion matrices, one per threshold."""
        total = self._counts.sum(axis=2)
        failed = self._counts.cumsum(axis=2)[..., :THRESHOLDS]  # pixels that do not pass the threshold: background
        matrices: Counts = np.moveaxis(total[..., None] - failed, 2, 0)
        matrices[:, :, 0] += np.moveaxis(failed.sum(axis=1), 1, 0)
        return matrices

    def miou(self) -> Ratios:
        """(100,) mIoU at the thresholds 0, 0.01, ... 0.99."""
        return mean(iou(self.matrices()))
