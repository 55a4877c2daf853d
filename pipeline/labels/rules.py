"""Label rules: from class maps and saliency of one image to its label map. A new rule is a function in ``RULES``.

Scores are H x W in [0, 1]; the background's comes first, so that it wins a tie, and of two classes the lower id.
Label maps are uint8: 0 background, 1..K, 255 ignore.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.labels.confident import confident_winners
from pipeline.labels.crf import FLOOR, dense_crf
from pipeline.labels.edam import fused_winners
from pipeline.schema import PseudoLabels
from pipeline.stores.raster import Raster

IGNORE = 255
Scores = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Cues:
    """What a rule decides from. ``scores`` is C x H x W, of ``classes``: 0 (background), then class ids ascending."""

    classes: tuple[int, ...]
    scores: Scores
    saliency: Scores | None  # H x W in [0, 1]
    image: NDArray[np.uint8] | None  # H x W x 3, RGB; the CRF needs it


def label_image(
    maps: Mapping[int, Raster],
    saliency: Raster | None,
    image: NDArray[np.uint8] | None,
    rule: PseudoLabels,
    shape: tuple[int, int],
) -> Raster:
    """The pseudo label of one image.

    Args:
        maps: by class id, any size, value / 255; of the image's tags alone. A tag without a map scores 0 everywhere.
        saliency: at the image's size, value / 255; needed where ``rule.saliency`` is set.
        image: RGB, needed where ``rule.crf`` is set.
        shape: (H, W) of the image and of the label.

    Raises:
        ValueError: what the rule needs is not given, or has another size.
    """
    classes = sorted(maps)
    scores = np.empty((1 + len(classes), *shape), np.float32)
    scores[0] = rule.background
    salient: Scores | None = None
    if rule.saliency:
        if saliency is None:
            raise ValueError("the rule takes its background from saliency, and none is given")
        if saliency.shape != shape:
            raise ValueError(f"the saliency map is {saliency.shape}, the image {shape}")
        salient = np.divide(saliency, 255, dtype=np.float32)
        scores[0] = np.divide(255 - saliency, 255, dtype=np.float32)  # 1 - salient, rounded as class scores are
    for channel, class_id in enumerate(classes, 1):
        scores[channel] = class_score(maps[class_id], rule.normalise, shape)
    if rule.background_power is not None:  # 1: EDAM's background before the CRF; 8: AGEN's
        scores[0] = (1 - scores[1:].max(axis=0, initial=0).clip(max=1)) ** rule.background_power
    return RULES[rule.rule](Cues((0, *classes), scores, salient, image), rule)


def class_score(stored: Raster, normalise: str, shape: tuple[int, int]) -> Scores:
    """A stored map at ``shape`` (bilinear), then stretched from its own range ('minmax') or maximum ('max') to 1."""
    score = np.asarray(cv2.resize(stored.astype(np.float32) / 255, shape[::-1], interpolation=cv2.INTER_LINEAR))
    low = score.min() if normalise == "minmax" else np.float32(0)
    reach = score.max() - low if normalise != "none" else np.float32(1)
    return (score - low) / reach if reach > 0 else np.zeros(shape, np.float32)


def threshold(cues: Cues, rule: PseudoLabels) -> Raster:
    """The highest score wins. Nothing is ignored but what the CRF is unsure of."""
    winners, unsure = decide(cues.scores, cues, rule)
    return as_labels(winners, unsure, cues.classes)


def oaa(cues: Cues, rule: PseudoLabels) -> Raster:
    """OAA's label generation (Sec. 4; thresholds from its public code).

    The highest score wins, after scores below ``attention_threshold`` were set to 0 (where none remains, background
    wins). Ignored are: two scores above ``conflict_threshold``; background that is salient or has a class above
    ``object_threshold``; and the whole image where objects keep less than ``minimum_foreground`` of it.

    With a CRF, its marginals of the thresholded scores choose the winner (where none remains, all are as likely and
    the neighbours decide), and the conditions follow as before, on the thresholded scores.
    """
    scores = np.where(cues.scores < rule.attention_threshold, np.float32(0), cues.scores)
    winners, unsure = decide(scores, cues, rule)
    conflict = (scores > rule.conflict_threshold).sum(axis=0) > 1
    doubtful = (scores[1:] > rule.object_threshold).any(axis=0)
    if cues.saliency is not None:
        doubtful |= cues.saliency >= rule.saliency_threshold
    labels = as_labels(winners, unsure | conflict | (doubtful & (winners == 0)), cues.classes)
    foreground = ((labels > 0) & (labels != IGNORE)).mean()
    return labels if foreground >= rule.minimum_foreground else np.full_like(labels, IGNORE)


def drs(cues: Cues, rule: PseudoLabels) -> Raster:
    """DRS's label generation: object cues and background cues; a pixel with neither is ignored.

    Object cues are scores above ``attention_threshold`` (alpha; 0.2), background cues saliency below
    ``saliency_threshold`` (beta). The paper has beta 0.06; its public code cuts at 50/255, which is beta 0.2 (51/255)
    here. A pixel with both is background, which counts 1 (the code; the paper does not say), and of several object
    cues the strongest wins. The code also ignores pixels of more than two scores, the background's among them, above
    ``conflict_threshold`` (0.9); the paper does not: 1.
    """
    if cues.saliency is None:
        raise ValueError("the rule drs takes its background cues from saliency, and none is given")
    scores = np.where(cues.scores > rule.attention_threshold, cues.scores, np.float32(0))
    scores[0] = cues.saliency < rule.saliency_threshold
    winners, unsure = decide(scores, cues, rule)
    conflict = (scores > rule.conflict_threshold).sum(axis=0) > 2
    return as_labels(winners, unsure | conflict | ~scores.any(axis=0), cues.classes)


def edam(cues: Cues, rule: PseudoLabels) -> Raster:
    """EDAM's label generation: see ``fused_winners``, which gets the CRF's marginals where the rule has a CRF.

    The background's own score is no matter of saliency, but ``background`` or of ``background_power``, as in the public
    code, which leaves the learned background of the paper aside.
    """
    if cues.saliency is None:
        raise ValueError("the rule edam refines its labels by saliency, and none is given")
    scores = cues.scores.copy()
    if rule.background_power is None:
        scores[0] = rule.background
    scores, unsure = refined(scores, cues, rule)
    return as_labels(fused_winners(scores, cues.saliency, rule), unsure, cues.classes)


def confident(cues: Cues, rule: PseudoLabels) -> Raster:
    """IRN's confident labels: see ``confident_winners``. The background's scores are the rule's two constants."""
    if cues.image is None:
        raise ValueError("the rule has a CRF, and no image is given")
    winners, unsure = confident_winners(cues.scores, cues.image, rule)
    return as_labels(winners, unsure, cues.classes)


def decide(scores: Scores, cues: Cues, rule: PseudoLabels) -> tuple[NDArray[np.intp], Mask]:
    """Each pixel's winning channel, by CRF where the rule has one, and where that stays below ``rule.confidence``."""
    found, unsure = refined(scores, cues, rule)
    return found.argmax(axis=0), unsure


def refined(scores: Scores, cues: Cues, rule: PseudoLabels) -> tuple[Scores, Mask]:
    """The CRF's marginals, and where the strongest stays below ``rule.confidence``; without a CRF, the scores."""
    if rule.crf is None:
        return scores, np.zeros(scores.shape[1:], np.bool_)
    if cues.image is None:
        raise ValueError("the rule has a CRF, and no image is given")
    marginals = dense_crf(cues.image, as_probabilities(scores), rule.crf)
    return marginals, marginals.max(axis=0) < rule.confidence


def as_probabilities(scores: Scores) -> Scores:
    """Scores over their sum; none is below ``FLOOR``, and where all are 0 each class is as likely."""
    floored = np.maximum(scores, np.float32(FLOOR))
    floored /= floored.sum(axis=0)
    return floored


def as_labels(winners: NDArray[np.intp], ignored: Mask, classes: tuple[int, ...]) -> Raster:
    """Channels as class ids, with what is ignored at 255."""
    labels = np.asarray(classes, np.uint8)[winners]
    labels[ignored] = IGNORE
    return labels


RULES: dict[str, Callable[[Cues, PseudoLabels], Raster]] = {
    "oaa": oaa,
    "drs": drs,
    "edam": edam,
    "confident": confident,
    "threshold": threshold,
}
