"""OAA's label rule."""

from dataclasses import dataclass

import numpy as np

from pipeline.config.reader import Share
from pipeline.config.registry import RULES
from pipeline.labels.background import Background, describe, with_background
from pipeline.labels.base import IGNORE, CrfRule, Cues, as_labels
from pipeline.stores.raster import Raster


@RULES.register("oaa")
@dataclass(frozen=True, kw_only=True)
class Oaa(CrfRule):
    """OAA's label generation (Sec. 4). The paper gives no symbols; all thresholds are those of the public code.

    Scores below ``attention`` are set to 0, and each pixel takes the label with the highest score (background if all
    are 0). A pixel is ignored if two scores are above ``conflict``, or if background wins although the pixel is
    salient or a class score is above ``object``. The whole image is ignored if objects cover less than
    ``minimum_foreground`` of it.

    With a CRF, the marginals of the thresholded scores decide the label; pixels whose scores are all 0 start uniform.
    The conditions above still use the thresholded scores.
    """

    background: Background = "saliency"
    attention: Share = 0.3
    conflict: Share = 0.9
    object: Share = 0.8
    saliency: Share | None = 0.125  # a pixel is salient from this value (32/255) on; null ignores no pixel for it
    minimum_foreground: Share = 0.01

    @property
    def needs_saliency(self) -> bool:
        return self.background == "saliency" or self.saliency is not None

    def label(self, cues: Cues) -> Raster:
        scores = with_background(self.background, cues)
        scores = np.where(scores < self.attention, np.float32(0), scores)
        winners, unsure = self.decide(scores, cues)
        conflict = (scores > self.conflict).sum(axis=0) > 1
        doubtful = (scores[1:] > self.object).any(axis=0)
        if self.saliency is not None:
            doubtful |= cues.salient >= self.saliency
        labels = as_labels(winners, unsure | conflict | (doubtful & (winners == 0)), cues.classes)
        foreground = ((labels > 0) & (labels != IGNORE)).mean()
        return labels if foreground >= self.minimum_foreground else np.full_like(labels, IGNORE)

    def describe(self) -> str:
        salient = ["salient background ignored"] if self.saliency is not None else []
        return self.summary(describe(self.background), *salient)
