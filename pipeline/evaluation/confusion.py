"""The confusion matrix of label maps, and the scores read from it.

One matrix is kept over a whole set of images: IoU is a ratio of pixels of the set, not a mean over images (the PASCAL
VOC definition). Classes found neither in the ground truth nor in the prediction have no IoU and are left out of means.
"""

import numpy as np
from numpy.typing import NDArray

IGNORE = 255

Labels = NDArray[np.uint8]
Counts = NDArray[np.int64]
Ratios = NDArray[np.float64]


class ConfusionMatrix:
    """Pixel counts of ground truth against prediction for background and K object classes.

    Pixels whose ground truth is 255 are excluded. Pixels whose prediction is 255 are counted apart, so that
    ``matrix`` can leave them out or count them as background.
    """

    def __init__(self, num_classes: int) -> None:
        """``num_classes``: K, background not counted."""
        self.num_classes = num_classes
        self._counts = np.zeros((num_classes + 1, num_classes + 1), np.int64)
        self._ignored = np.zeros(num_classes + 1, np.int64)

    def update(self, ground_truth: Labels, prediction: Labels) -> None:
        """Add an image: two label maps of one shape, uint8, values 0..K and 255.

        Raises:
            ValueError: the shapes or types differ, or a value is no class id.
        """
        if ground_truth.shape != prediction.shape:
            raise ValueError(f"label map of shape {prediction.shape} against a mask of shape {ground_truth.shape}")
        if ground_truth.dtype != np.uint8 or prediction.dtype != np.uint8:
            raise ValueError(f"label maps are uint8, not {ground_truth.dtype} and {prediction.dtype}")
        pairs = ground_truth.astype(np.intp).ravel()
        pairs <<= 8
        pairs |= prediction.ravel()
        joint = np.bincount(pairs, minlength=1 << 16).reshape(256, 256)
        classes = self.num_classes + 1
        # Values above K can only be seen in the joint counts: what is neither a class nor 255 would vanish silently.
        stray = joint.sum(axis=0) + joint.sum(axis=1)
        if stray[classes:IGNORE].any():
            values = ", ".join(map(str, classes + np.flatnonzero(stray[classes:IGNORE])))
            raise ValueError(f"label values {values} are neither class ids (0 to {self.num_classes}) nor 255")
        self._counts += joint[:classes, :classes]
        self._ignored += joint[:classes, IGNORE]

    def matrix(self, ignored_as_background: bool = False) -> Counts:
        """(K+1) x (K+1) pixel counts, a row a ground-truth class; predictions of 255 left out or put in column 0."""
        counts = self._counts.copy()
        if ignored_as_background:
            counts[:, 0] += self._ignored
        return counts

    @property
    def ignored(self) -> float:
        """Share of the pixels with ground truth whose prediction is 255; NaN where there are none."""
        ignored = self._ignored.sum()
        return float(ratio(ignored, ignored + self._counts.sum()))


def iou(counts: Counts) -> Ratios:
    """Intersection over union per class, from (..., C, C) counts; NaN for a class absent from both sides."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    return ratio(hits, counts.sum(axis=-1) + counts.sum(axis=-2) - hits)


def class_accuracy(counts: Counts) -> Ratios:
    """Share of each class's ground-truth pixels that are predicted right; NaN for a class without any."""
    return ratio(np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(axis=-1))


def pixel_accuracy(counts: Counts) -> float:
    """Share of all counted pixels that are predicted right."""
    return float(ratio(np.trace(counts), counts.sum()))


def mean(ratios: Ratios) -> Ratios:
    """Mean over the last axis of what is not NaN; NaN where nothing is left."""
    return ratio(np.nansum(ratios, axis=-1), np.sum(~np.isnan(ratios), axis=-1))


def all_background_miou(counts: Counts) -> float:
    """mIoU of predicting background everywhere on the same ground truth: the score that any method must beat."""
    trivial = np.zeros_like(counts)
    trivial[:, 0] = counts.sum(axis=1)
    return float(mean(iou(trivial)))


def ratio(part: Counts | Ratios | np.int64, whole: Counts | np.int64) -> Ratios:
    """``part / whole``, NaN where ``whole`` is 0."""
    whole = np.asarray(whole)
    shares: Ratios = np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
    return shares
