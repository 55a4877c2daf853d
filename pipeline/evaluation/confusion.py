"""Confusion matrix of label maps, and the scores computed from it.

Pixels are pooled over the whole set of images: IoU is a ratio of pixel counts, not a mean over images (the PASCAL VOC
definition). A class absent from both ground truth and prediction has no IoU and is left out of means. So do irn and
mmsegmentation; ``conventions`` counts as other public codes do.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.data.streams import Purpose, rng

IGNORE = 255

Labels = NDArray[np.uint8]
Counts = NDArray[np.int64]
Ratios = NDArray[np.float64]


class ConfusionMatrix:
    """Pixel counts of ground truth against prediction for background and K object classes.

    Pixels with ground truth 255 are excluded. Pixels with prediction 255 are counted separately, so that ``matrix`` can
    exclude them or count them as background.
    """

    def __init__(self, num_classes: int) -> None:
        """``num_classes``: K, without background."""
        self.num_classes = num_classes
        self._counts = np.zeros((num_classes + 1, num_classes + 1), np.int64)
        self._ignored = np.zeros(num_classes + 1, np.int64)
        self._images: list[Counts] = []

    def update(self, ground_truth: Labels, prediction: Labels) -> None:
        """Add an image: two H x W uint8 label maps with values 0..K and 255.

        Raises:
            ValueError: the shapes differ, a map is not uint8, or a value is neither a class id nor 255.
        """
        if ground_truth.shape != prediction.shape:
            raise ValueError(f"the label map has shape {prediction.shape}, but its mask has shape {ground_truth.shape}")
        if ground_truth.dtype != np.uint8 or prediction.dtype != np.uint8:
            raise ValueError(f"label maps must be uint8, not {ground_truth.dtype} and {prediction.dtype}")
        pairs = ground_truth.astype(np.intp).ravel()
        pairs <<= 8
        pairs |= prediction.ravel()
        joint = np.bincount(pairs, minlength=1 << 16).reshape(256, 256)
        classes = self.num_classes + 1
        # Check values above K here: the slice below would silently drop anything that is neither a class nor 255.
        stray = joint.sum(axis=0) + joint.sum(axis=1)
        if stray[classes:IGNORE].any():
            values = ", ".join(map(str, classes + np.flatnonzero(stray[classes:IGNORE])))
            raise ValueError(f"label values {values} are neither class ids (0 to {self.num_classes}) nor 255")
        counts, ignored = joint[:classes, :classes], joint[:classes, IGNORE]
        self._counts += counts
        self._ignored += ignored
        hits, masked, predicted = np.diagonal(counts).copy(), counts.sum(1) + ignored, counts.sum(0)
        hits[0] += ignored[0]
        predicted[0] += ignored.sum()
        self._images.append(np.stack([hits, masked, predicted]))

    def matrix(self, ignored_as_background: bool = False) -> Counts:
        """(K+1) x (K+1) pixel counts, one row per ground-truth class; predictions of 255 excluded or in column 0."""
        counts = self._counts.copy()
        if ignored_as_background:
            counts[:, 0] += self._ignored
        return counts

    def images(self) -> Counts:
        """(N, 3, K+1) pixels of each image and class: correct, in the mask, and predicted; 255 counts as background."""
        return np.stack(self._images) if self._images else np.zeros((0, 3, self.num_classes + 1), np.int64)

    def conventions(self) -> dict[str, float]:
        """The mIoU as public codes count it; NaN if no pixel is counted.

        * ``irn``: a predicted 255 is background. A class absent from masks and predictions is left out of the mean; one
          that is only predicted counts as 0.
        * ``mmsegmentation``: the same, except that a predicted 255 is a miss: it belongs to no class's prediction.
        * ``seam``: a predicted 255 is a miss, and a class absent from masks and predictions counts as 0.
        * ``deeplab_pytorch``: a predicted 255 is background, and all classes absent from the masks are left out.
        """
        background, missed = self.matrix(ignored_as_background=True), self.matrix()
        hits = np.diagonal(missed)
        strict = ratio(hits, missed.sum(1) + self._ignored + missed.sum(0) - hits)
        in_masks = background.sum(1) > 0
        return {
            "irn": float(mean(iou(background))),
            "mmsegmentation": float(mean(strict)),
            "seam": float(np.nan_to_num(strict).mean()) if in_masks.any() else float("nan"),
            "deeplab_pytorch": float(mean(iou(background)[in_masks])),
        }

    @property
    def ignored(self) -> float:
        """Share of pixels with ground truth whose prediction is 255; NaN if no pixel has ground truth."""
        ignored = self._ignored.sum()
        return float(ratio(ignored, ignored + self._counts.sum()))


def iou(counts: Counts) -> Ratios:
    """Intersection over union per class, from (..., C, C) counts; NaN for a class absent from both sides."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    return ratio(hits, counts.sum(axis=-1) + counts.sum(axis=-2) - hits)


def class_accuracy(counts: Counts) -> Ratios:
    """Share of each class's ground-truth pixels that are predicted correctly; NaN for a class without any."""
    return ratio(np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(axis=-1))


def pixel_accuracy(counts: Counts) -> float:
    """Share of all counted pixels that are predicted correctly."""
    return float(ratio(np.trace(counts), counts.sum()))


def mean(ratios: Ratios) -> Ratios:
    """Mean over the last axis, ignoring NaN; NaN if all values are NaN."""
    return ratio(np.nansum(ratios, axis=-1), np.sum(~np.isnan(ratios), axis=-1))


def bootstrap(images: Counts, resamples: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mIoU over resamples of the images, with replacement; NaN without images.

    A class that a resample lacks keeps its IoU over all images. Left out, it would shift the means of small sets, whose
    resamples lack just the rare, difficult classes.

    The interval covers the choice of the evaluation images only, neither that of the training images nor the seed.

    Args:
        images: (N, 3, K+1) counts of ``ConfusionMatrix.images``.
    """
    count = len(images)
    if not count:
        return float("nan"), float("nan")
    draws = rng(seed, Purpose.BOOTSTRAP).multinomial(count, np.full(count, 1 / count), resamples)
    sums = (draws.astype(np.float64) @ images.reshape(count, -1)).reshape(resamples, *images.shape[1:])
    hits, masked, predicted = np.moveaxis(np.rint(sums).astype(np.int64), 1, 0)
    resampled = ratio(hits, masked + predicted - hits)
    hits, masked, predicted = images.sum(0)
    resampled = np.where(np.isnan(resampled), ratio(hits, masked + predicted - hits), resampled)
    low, high = np.quantile(mean(resampled), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def all_background_miou(counts: Counts) -> float:
    """mIoU of predicting background everywhere: the trivial baseline on the same ground truth."""
    trivial = np.zeros_like(counts)
    trivial[:, 0] = counts.sum(axis=1)
    return float(mean(iou(trivial)))


def ratio(part: Counts | Ratios | np.int64, whole: Counts | np.int64) -> Ratios:
    """``part / whole``, NaN where ``whole`` is 0."""
    whole = np.asarray(whole)
    shares: Ratios = np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
    return shares
