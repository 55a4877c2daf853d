"""Boxes drawn from maps, and their localization accuracy (OAA Sec. 4.5; Zhou et al. 2016; Choe et al. 2020, 2022).

A box is (left, top, right, bottom) in pixels; right and bottom are exclusive. A map is resized bilinearly to its image
and divided by its maximum. Its boxes at a threshold enclose the 8-connected components of the pixels above it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.confusion import Labels, ratio

Boxes = NDArray[np.float64]  # N x 4
THRESHOLDS = 100  # 0, 0.01, ... 0.99 of a map's maximum
OVERLAPS = (0.3, 0.5, 0.7)  # IoUs of MaxBoxAccV2
MATCH = 0.5  # least IoU of a correct box in the other measures
RANKS = (1, 5)
HIGHEST = max(RANKS)  # classes of each image whose maps are stored, or all if there are fewer
TIE = 1e-4  # tolerance in units of 0.01, so that 0.3 in float32 does not exceed the threshold 0.3


def iou(boxes: Boxes, others: Boxes) -> NDArray[np.float64]:
    """Intersection over union of each of N boxes with each of M others, N x M."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.maximum(high - low, 0).prod(2)
    areas, others_areas = ((side[:, 2:] - side[:, :2]).prod(1) for side in (boxes, others))
    return np.asarray(shared / (areas[:, None] + others_areas[None] - shared), np.float64)


def normalised(raster: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize an h x w map to H x W and divide it by its maximum; a zero map stays zero.

    Choe et al.'s code subtracts the minimum first. Here, 0 means no attention.
    """
    resized = cv2.resize(raster.astype(np.float32), size[::-1], interpolation=cv2.INTER_LINEAR)
    return np.asarray(resized / max(float(resized.max()), 1e-5), np.float32)


def levels(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """How many of the thresholds 0, 0.01, ... 0.99 each value in [0, 1] exceeds, 0 to 100."""
    return np.clip(np.ceil(values * THRESHOLDS - TIE), 0, THRESHOLDS).astype(np.uint8)


def components(mask: NDArray[np.bool_]) -> Boxes:
    """The boxes of the 8-connected components of an H x W mask, N x 4."""
    # Contours are traced in a twentieth of the time that labelling every pixel takes.
    contours, hierarchy = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    outer = [contour for contour, links in zip(contours, hierarchy[0], strict=True) if links[3] < 0] if contours else []
    left, top, width, height = np.array([cv2.boundingRect(contour) for contour in outer]).reshape(-1, 4).T
    return np.stack([left, top, left + width, top + height], 1).astype(np.float64)


def largest(mask: NDArray[np.bool_]) -> Boxes:
    """The box of the component with the most pixels, 1 x 4, or 0 x 4 if the mask is empty."""
    _, _, table, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if len(table) == 1:  # the background
        return np.zeros((0, 4))
    left, top, width, height = table[1 + table[1:, cv2.CC_STAT_AREA].argmax(), :4]
    return np.array([[left, top, left + width, top + height]], np.float64)


def single_object(mask: Labels) -> tuple[int, Boxes] | None:
    """The class of a mask and its box, 1 x 4, if its object pixels form one component of one class; None otherwise.

    Pixels of 255, the outlines in VOC's masks, are background here.
    """
    classes = np.setdiff1d(mask, [0, 255])
    if len(classes) != 1:
        return None
    found = components(mask == classes[0])
    return (int(classes[0]), found) if len(found) == 1 else None


def mask_boxes(mask: Labels, tags: Sequence[int], single: bool) -> dict[int, Boxes]:
    """The true boxes in a mask by class id, of tagged classes.

    Args:
        single: only the box of a single object (``single_object``) that is the image's only tag; none otherwise. If
            false, one box for each class, around all of its pixels.
    """
    if single:
        found = single_object(mask)
        return {found[0]: found[1]} if found is not None and tuple(tags) == (found[0],) else {}
    truth = {}
    for class_id in tags:
        rows, columns = np.nonzero(mask == class_id)
        if len(rows):
            truth[class_id] = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], np.float64)
    return truth


class BoxScores:
    """Localization accuracy over images.

    * ``top_k_localization``: share of the images of which one of the k highest classes is right and the box of that
      class (largest component above ``threshold``) has an IoU of at least 0.5 with a true box of the class.
    * ``top_k_classification``: the same without boxes.
    * ``known``: share of (image, true class) pairs whose box has such an IoU, whatever the class scores are
      (ground-truth-known localization accuracy).
    * ``max_box_accuracy``: MaxBoxAccV2. At a threshold, a pair counts as found at an IoU if any pair of a component's
      box and a true box has at least this IoU. The share of found pairs at the best of all thresholds, chosen on ground
      truth, is averaged over the IoUs 0.3, 0.5 and 0.7.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._found = np.zeros((len(OVERLAPS), THRESHOLDS), np.int64)  # pairs
        self._known: list[bool] = []  # by pair
        self._correct: list[list[bool]] = []  # by image: classified and localized at each rank

    def update(
        self,
        size: tuple[int, int],
        maps: Mapping[int, NDArray[np.uint8]],
        ranking: Sequence[int],
        truth: Mapping[int, Boxes],
    ) -> dict[int, Boxes]:
        """Add an image.

        Args:
            size: height and width.
            maps: class id -> h x w map; those of all true classes, at least.
            ranking: the highest class ids, best first.
            truth: class id -> true boxes, N x 4 with N > 0.

        Returns:
            The box of each map, 1 x 4, or 0 x 4 for a map without positive values.
        """
        drawn, localized = {}, {}
        for class_id, raster in maps.items():
            values = normalised(raster, size)
            drawn[class_id] = box = largest(values > self.threshold + TIE / THRESHOLDS)
            if class_id in truth:
                localized[class_id] = bool((iou(box, truth[class_id]) >= MATCH).any())
                self._sweep(levels(values), truth[class_id])
        self._known.extend(localized[class_id] for class_id in truth)
        tops = [[class_id for class_id in ranking[:rank] if class_id in truth] for rank in RANKS]
        self._correct.append([bool(top) for top in tops] + [any(localized[c] for c in top) for top in tops])
        return drawn

    def _sweep(self, level: NDArray[np.uint8], truth: Boxes) -> None:
        best = np.zeros(THRESHOLDS)  # IoU at each threshold
        for threshold in range(int(level.max())):
            best[threshold] = iou(components(level > threshold), truth).max()
        self._found += best[None] >= np.array(OVERLAPS)[:, None]

    def summary(self) -> dict[str, Any]:
        """The scores; NaN without images."""
        pairs = len(self._known)
        correct = np.array(self._correct, np.int64).reshape(-1, 2 * len(RANKS)).sum(0)
        shares = ratio(correct, np.full(len(correct), len(self._correct)))
        names = [f"top_{rank}_{kind}" for kind in ("classification", "localization") for rank in RANKS]
        recall = ratio(self._found, np.full_like(self._found, pairs))
        best = recall.argmax(1)
        return {
            **dict(zip(names, shares.tolist(), strict=True)),
            "known": float(ratio(np.int64(sum(self._known)), np.int64(pairs))),
            "pairs": pairs,
            "max_box_accuracy": float(recall.max(1).mean()),
            "max_box_accuracy_at": {
                f"{overlap:g}": {"accuracy": recall[row, best[row]], "threshold": best[row] / THRESHOLDS}
                for row, overlap in enumerate(OVERLAPS)
            },
            "box_sweep": {
                "threshold": np.arange(THRESHOLDS) / THRESHOLDS,
                **{f"{overlap:g}": recall[row] for row, overlap in enumerate(OVERLAPS)},
            },
        }
