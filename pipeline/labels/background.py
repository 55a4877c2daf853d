"""Where a rule takes the score of the background from, as the key ``background`` states it."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from pipeline.config import reader
from pipeline.config.reader import Faults, Positive, Share
from pipeline.labels.base import Cues, Scores


@dataclass(frozen=True)
class Power:
    """The score (1 - strongest class)^power: EDAM has power 1 before its CRF, AGEN 8 (Eq. 4)."""

    power: Positive


Source = float | Power | Literal["saliency"]


@dataclass(frozen=True)
class _Reader:
    """Reads a constant, {power: VALUE}, or 'saliency' where that is allowed."""

    saliency: bool

    def read(self, value: Any, where: str, faults: Faults) -> Any:
        if isinstance(value, dict):
            return reader.build_block(Power, value, where, faults)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return reader.build(Share, value, where, faults)
        if not (self.saliency and value == "saliency"):
            choices = "a constant, {power: VALUE} or saliency" if self.saliency else "a constant or {power: VALUE}"
            faults.append(f"{where}: must be {choices}, not {reader.shown(value)}")
        return value


Background = Annotated[Source, _Reader(saliency=True)]
OwnBackground = Annotated[float | Power, _Reader(saliency=False)]


def with_background(source: Source, cues: Cues) -> Scores:
    """(1 + C) x H x W: the background's score, then the class scores.

    Raises:
        ValueError: ``source`` is 'saliency', and there is no saliency map.
    """
    scores = np.empty((1 + len(cues.scores), *cues.scores.shape[1:]), np.float32)
    scores[1:] = cues.scores
    if isinstance(source, Power):
        scores[0] = (1 - cues.scores.max(axis=0, initial=0).clip(max=1)) ** source.power
    else:
        scores[0] = cues.not_salient if source == "saliency" else source
    return scores


def describe(source: Source) -> str:
    """As 'constant background 0.3', 'background 1 - saliency' or 'background (1 - strongest)^8'."""
    if isinstance(source, Power):
        return f"background (1 - strongest)^{source.power:g}"
    return "background 1 - saliency" if source == "saliency" else f"constant background {source:g}"
