"""EDAM's label rule: saliency separates objects from background unless the class score strongly disagrees."""

from dataclasses import dataclass

import numpy as np

from pipeline.config.reader import Share
from pipeline.config.registry import RULES
from pipeline.labels.background import BackgroundWithoutSaliency, Power, describe, with_background
from pipeline.labels.base import CrfRule, Cues, as_labels
from pipeline.stores.raster import Raster

BEFORE_CRF = Power(1.0)


@RULES.register("edam")
@dataclass(frozen=True, kw_only=True)
class Edam(CrfRule):
    """EDAM's post-processing (Sec. 3.4, Alg. 1), applied to the CRF's marginals if there is a CRF.

    Each pixel takes the label with the highest score. An object label is kept

    * where saliency is at least ``theta``, if its score is at least ``alpha``;
    * elsewhere, if its score is above ``beta``.

    All other pixels become background; a background label never changes. Two details follow the paper, not the public
    code: the code takes the lowest id among several classes above beta, and it treats saliency equal to theta as
    background. As in the public code, the background score is not the one that the paper's network learns.
    """

    background: BackgroundWithoutSaliency = BEFORE_CRF
    alpha: Share = 0.25  # 0 disables background suppression
    beta: Share = 0.95  # 1 disables foreground pop-up
    theta: Share = 20 / 255

    @property
    def needs_saliency(self) -> bool:
        return True

    def label(self, cues: Cues) -> Raster:
        scores, unsure = self.refine(with_background(self.background, cues), cues)
        strongest = scores.max(axis=0)
        salient = cues.salient >= np.float32(self.theta)
        kept = np.where(salient, strongest >= self.alpha, strongest > self.beta)
        winners = np.where(kept, scores.argmax(axis=0), 0)
        return as_labels(winners, unsure, cues.classes)

    def describe(self) -> str:
        symbols = f"theta {self.theta:g}, alpha {self.alpha:g}, beta {self.beta:g}"
        return self.summary(describe(self.background), f"refined by saliency ({symbols})")
