"""Background scores of label rules: the values of the key ``background`` and the scores they define."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from pipeline.config import reader
from pipeline.config.reader import Faults, Positive, Share
from pipeline.labels.base import Cues, Scores


@dataclass(frozen=True)
class Power:
    """Background score (1 - strongest class score)^power: 1 for EDAM (before its CRF), 8 for AGEN (Eq. 4)."""

    power: Positive


Source = float | Power | Literal["saliency"]


@dataclass(frozen=True)
class _Reader:
    """Parses a constant, {power: VALUE}, or 'saliency' if the rule allows it."""

    saliency: bool

    def read(self, value: Any, where: str, faults: Faults) -> Any:
        if isinstance(value, dict):
            return reader.build_block(Power, value, where, faults)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return reader.build(Share, value, where, faults)
        if not (self.saliency and value == "saliency"):
            choices = "a constant, {power: VALUE} or saliency" if self.saliency else "a constant or {power: VALUE}"
            faults.append(f"{where}: must be {choices}, not {reader.quoted(value)}")
        return value


Background = Annotated[Source, _Reader(saliency=True)]
BackgroundWithoutSaliency = Annotated[float | Power, _Reader(saliency=False)]


def with_background(source: Source, cues: Cues) -> Scores:
    """Prepend the background score to the class scores: (1 + C) x H x W.

    Raises:
        ValueError: ``source`` is 'saliency' but ``cues`` has no saliency map.
    """
    scores = np.empty((1 + len(cues.scores), *cues.scores.shape[1:]), np.float32)
    scores[1:] = cues.scores
    if isinstance(source, Power):
        scores[0] = (1 - cues.scores.max(axis=0, initial=0).clip(max=1)) ** source.power
    else:
        scores[0] = cues.not_salient if source == "saliency" else source
    return scores


def describe(source: Source) -> str:
    """Return 'constant background 0.3', 'background 1 - saliency' or 'background (1 - strongest)^8'."""
    if isinstance(source, Power):
        return f"background (1 - strongest)^{source.power:g}"
    return "background 1 - saliency" if source == "saliency" else f"constant background {source:g}"
