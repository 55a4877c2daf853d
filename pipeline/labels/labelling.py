"""Pseudo labels: class maps of one image -> cues of a label rule -> label map."""

from collections.abc import Mapping
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.labels.base import Cues, Rule, Scores
from pipeline.stores.raster import Raster

Normalise = Literal["minmax", "max", "none"]


def label_image(
    maps: Mapping[int, Raster],
    saliency: Raster | None,
    image: NDArray[np.uint8] | None,
    rule: Rule,
    normalise: Normalise,
    shape: tuple[int, int],
) -> Raster:
    """Compute the pseudo label of one image, H x W uint8.

    Args:
        maps: class id -> h x w map of any size, value / 255, for the image's tags only. A tag without a map gets no
            pixel.
        saliency: H x W, value / 255; required where ``rule.needs_saliency``.
        image: H x W x 3, RGB; required where ``rule.needs_image``.
        normalise: see ``class_score``.
        shape: (H, W) of the image and of the label.

    Raises:
        ValueError: an input that the rule needs is missing, or the saliency map has another size.
    """
    if saliency is not None and saliency.shape != shape:
        raise ValueError(f"the saliency map is {saliency.shape}, but the image is {shape}")
    classes = tuple(sorted(maps))
    scores = np.empty((len(classes), *shape), np.float32)
    for channel, class_id in enumerate(classes):
        scores[channel] = class_score(maps[class_id], normalise, shape)
    return rule.label(Cues(classes, scores, saliency, image))


def class_score(stored: Raster, normalise: Normalise, shape: tuple[int, int]) -> Scores:
    """Resize a stored map to ``shape`` (bilinear) and normalise it by its range ('minmax') or maximum ('max')."""
    score = np.asarray(cv2.resize(stored.astype(np.float32) / 255, shape[::-1], interpolation=cv2.INTER_LINEAR))
    low = score.min() if normalise == "minmax" else np.float32(0)
    reach = score.max() - low if normalise != "none" else np.float32(1)
    return (score - low) / reach if reach > 0 else np.zeros(shape, np.float32)
