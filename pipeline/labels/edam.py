"""EDAM's label rule: saliency separates objects from background unless a class is sure of the opposite."""

from dataclasses import dataclass

import numpy as np

from pipeline.config.reader import Share
from pipeline.config.registry import RULES
from pipeline.labels.background import OwnBackground, Power, describe, with_background
from pipeline.labels.base import CrfRule, Cues, as_labels
from pipeline.stores.raster import Raster

BEFORE_CRF = Power(1.0)


@RULES.register("edam")
@dataclass(frozen=True, kw_only=True)
class Edam(CrfRule):
    """EDAM's post-processing (Sec. 3.4, Alg. 1), on the CRF's marginals where there is a CRF.

    The highest score wins. An object that has won is kept

    * where saliency is at least ``theta``, unless its score is below ``alpha``;
    * elsewhere, if its score is above ``beta``.

    All other pixels are background; where the background has won, it is final. Of several classes above beta the public
    code takes the lowest id, and it counts saliency equal to theta as background; here both are as in the paper. As in
    the public code, the background's score does not come from the background that the paper's network learns.
    """

    background: OwnBackground = BEFORE_CRF
    alpha: Share = 0.25  # 0: no background suppression
    beta: Share = 0.95  # 1: no foreground pop-up
    theta: Share = 20 / 255

    @property
    def needs_saliency(self) -> bool:
        return True

    def label(self, cues: Cues) -> Raster:
        scores, unsure = self.refined(with_background(self.background, cues), cues)
        strongest = scores.max(axis=0)
        salient = cues.salient >= np.float32(self.theta)
        kept = np.where(salient, strongest >= self.alpha, strongest > self.beta)
        winners = np.where(kept, scores.argmax(axis=0), 0)
        return as_labels(winners, unsure, cues.classes)

    def describe(self) -> str:
        symbols = f"theta {self.theta:g}, alpha {self.alpha:g}, beta {self.beta:g}"
        return self.described(describe(self.background), f"refined by saliency ({symbols})")
