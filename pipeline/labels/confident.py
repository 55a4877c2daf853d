"""Labels that are worth learning affinities from: objects and background where a CRF is sure, nothing in between."""

import numpy as np
from numpy.typing import NDArray

from pipeline.labels.crf import dense_crf
from pipeline.schema import Crf, PseudoLabels


def confident_winners(
    scores: NDArray[np.float32], image: NDArray[np.uint8], rule: PseudoLabels
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Each pixel's channel, and where none is sure (IRN; the two passes and their numbers are those of its code).

    Two passes, with the background at ``rule.background`` (0.30; AMR 0.60) and ``rule.low_background`` (0.05; AMR
    0.33): the highest score's label has the probability ``rule.certainty``, the others share the rest, and the CRF
    refines that. A pixel is an object's where the first pass says so, background where both say background, and
    unsure where the second alone sees an object.

    Args:
        scores: C x H x W, the background's first; what that holds is not looked at.
        image: H x W x 3, RGB.
        rule: with a CRF.

    Returns:
        H x W channels and H x W true where unsure.
    """
    assert rule.crf is not None
    sure, possible = (
        _refined(scores, background, image, rule.certainty, rule.crf)
        for background in (rule.background, rule.low_background)
    )
    return sure, (sure == 0) & (possible > 0)


def _refined(
    scores: NDArray[np.float32], background: float, image: NDArray[np.uint8], certainty: float, crf: Crf
) -> NDArray[np.intp]:
    """The CRF's labels from those of the highest scores."""
    count = len(scores)
    winners = np.concatenate([np.full_like(scores[:1], background), scores[1:]]).argmax(axis=0)
    chances = np.full_like(scores, (1 - certainty) / max(1, count - 1))
    np.put_along_axis(chances, winners[None], np.float32(certainty), axis=0)
    refined: NDArray[np.intp] = dense_crf(image, chances, crf).argmax(axis=0)
    return refined
