"""IRN's confident labels for affinity learning: pixels on which two CRF passes disagree are ignored."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from pipeline.config.reader import Range, Share
from pipeline.config.registry import RULES
from pipeline.config.schema import Crf
from pipeline.labels.base import Cues, Rule, as_labels
from pipeline.labels.crf import dense_crf, describe_crf
from pipeline.stores.raster import Raster

IRN_CRF = Crf(10, 3.0, 3.0, 50.0, 5.0, 10.0)


@RULES.register("confident")
@dataclass(frozen=True, kw_only=True)
class Confident(Rule):
    """Two CRF passes with the constant background scores ``high`` and ``low`` (from IRN's public code).

    In each pass the label with the highest score gets the probability ``certainty`` and the other labels share the
    rest equally; a CRF refines these probabilities. A pixel is an object where the ``high`` pass finds one, background
    where both passes find background, and ignored where only the ``low`` pass finds an object.
    """

    high: Share = 0.3  # AMR: 0.6
    low: Share = 0.05  # AMR: 0.33
    certainty: Annotated[float, Range(above=0, below=1)] = 0.7
    crf: Crf = IRN_CRF

    def faults(self) -> Iterator[str]:
        if self.low > self.high:
            yield f"low: {self.low:g} is above high, {self.high:g}; exchange the two"

    @property
    def needs_image(self) -> bool:
        return True

    def label(self, cues: Cues) -> Raster:
        sure, possible = (self._pass(background, cues) for background in (self.high, self.low))
        return as_labels(sure, (sure == 0) & (possible > 0), cues.classes)

    def describe(self) -> str:
        return f"constant backgrounds {self.high:g} and {self.low:g}, dense CRF {describe_crf(self.crf)}"

    def _pass(self, background: float, cues: Cues) -> NDArray[np.intp]:
        """H x W channel of the highest marginal after the CRF; 0 is the background."""
        image = cues.rgb()
        scores = np.concatenate([np.full((1, *image.shape[:2]), background, np.float32), cues.scores])
        rest = (1 - self.certainty) / max(1, len(scores) - 1)
        chances = np.full_like(scores, rest)
        np.put_along_axis(chances, scores.argmax(axis=0)[None], np.float32(self.certainty), axis=0)
        refined: NDArray[np.intp] = dense_crf(image, chances, self.crf).argmax(axis=0)
        return refined
