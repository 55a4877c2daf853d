"""EDAM's post-processing: saliency tells objects from background, but where a class says otherwise and is sure."""

import numpy as np
from numpy.typing import NDArray

from pipeline.schema import PseudoLabels


def fused_winners(scores: NDArray[np.float32], saliency: NDArray[np.float32], rule: PseudoLabels) -> NDArray[np.intp]:
    """Each pixel's channel (EDAM Sec. 3.4, Alg. 1).

    The highest score wins. An object that has won stays

    * where saliency is ``saliency_threshold`` (theta; 20/255) or more, unless its score is below
      ``attention_threshold`` (alpha; 0.25; 0: no background suppression);
    * elsewhere, if its score is above ``object_threshold`` (beta; 0.95; 1: no foreground pop-up).

    All else is background; where background has won, it is final. Of several classes above beta the public code takes
    the lowest id, and saliency equal to theta is background to it; here both are as in the paper.

    Args:
        scores: C x H x W, the background's first.
        saliency: H x W in [0, 1].
    """
    strongest = scores.max(axis=0)
    salient = saliency >= np.float32(rule.saliency_threshold)
    kept = np.where(salient, strongest >= rule.attention_threshold, strongest > rule.object_threshold)
    winners: NDArray[np.intp] = np.where(kept, scores.argmax(axis=0), 0)
    return winners
