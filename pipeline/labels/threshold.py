"""Label rule of CAM, AMR and IRN: each pixel takes the highest score, background included."""

from dataclasses import dataclass

from pipeline.config.registry import RULES
from pipeline.labels.background import Background, describe, with_background
from pipeline.labels.base import CrfRule, Cues, as_labels
from pipeline.stores.raster import Raster


@RULES.register("threshold")
@dataclass(frozen=True, kw_only=True)
class Threshold(CrfRule):
    """Argmax over background and class scores; only pixels below the CRF's ``confidence`` are ignored."""

    background: Background = 0.3

    @property
    def needs_saliency(self) -> bool:
        return self.background == "saliency"

    def label(self, cues: Cues) -> Raster:
        winners, unsure = self.decide(with_background(self.background, cues), cues)
        return as_labels(winners, unsure, cues.classes)

    def describe(self) -> str:
        return self.summary(describe(self.background))
