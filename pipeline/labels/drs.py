"""DRS's label rule."""

from dataclasses import dataclass

import numpy as np

from pipeline.config.reader import Share
from pipeline.config.registry import RULES
from pipeline.labels.base import CrfRule, Cues, as_labels
from pipeline.stores.raster import Raster


@RULES.register("drs")
@dataclass(frozen=True, kw_only=True)
class Drs(CrfRule):
    """DRS's label generation from object cues and background cues; a pixel with neither is ignored.

    Object cues are scores above ``alpha``; the background cue is saliency below ``beta``. The background cue has the
    score 1, so that it wins over object cues (the public code; the paper leaves this open). Among object cues the
    strongest wins.
    """

    alpha: Share = 0.2
    beta: Share = 0.06  # paper; the public code cuts at 50/255, which corresponds to 0.2 (51/255) here
    # Public code: ignore pixels with more than two scores (background included) above this. 1 disables it (paper).
    conflict: Share = 0.9

    @property
    def needs_saliency(self) -> bool:
        return True

    def label(self, cues: Cues) -> Raster:
        objects = np.where(cues.scores > self.alpha, cues.scores, np.float32(0))
        scores = np.concatenate([(cues.salient < self.beta)[None].astype(np.float32), objects])
        winners, unsure = self.decide(scores, cues)
        conflict = (scores > self.conflict).sum(axis=0) > 2
        return as_labels(winners, unsure | conflict | ~scores.any(axis=0), cues.classes)

    def describe(self) -> str:
        return self.summary(f"background where saliency is below {self.beta:g}")
