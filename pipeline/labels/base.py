"""Interface of label rules, which turn the class scores, saliency and colours of one image into a label map.

Each rule registers itself in its own file (``@RULES.register("drs")``); its dataclass fields are its settings. Label
maps are uint8: 0 background, 1..K classes, 255 ignored. No module of this package imports torch.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.config.reader import Share
from pipeline.config.schema import Crf
from pipeline.labels.crf import FLOOR, dense_crf, describe_crf
from pipeline.stores.raster import Raster

IGNORE = 255
Scores = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Cues:
    """Input of a label rule for one image.

    Attributes:
        classes: ids of the image's tags, ascending.
        scores: C x H x W in [0, 1], one channel per class.
        saliency: H x W uint8, value / 255; None unless the rule ``needs_saliency``.
        image: H x W x 3 uint8, RGB; None unless the rule ``needs_image``.
    """

    classes: tuple[int, ...]
    scores: Scores
    saliency: Raster | None
    image: NDArray[np.uint8] | None

    @property
    def salient(self) -> Scores:
        """H x W saliency in [0, 1].

        Raises:
            ValueError: there is no saliency map.
        """
        return np.divide(self._saliency(), 255, dtype=np.float32)

    @property
    def not_salient(self) -> Scores:
        """H x W: (255 - saliency) / 255, which rounds as class scores do.

        Raises:
            ValueError: there is no saliency map.
        """
        return np.divide(255 - self._saliency(), 255, dtype=np.float32)

    def _saliency(self) -> Raster:
        if self.saliency is None:
            raise ValueError("the rule needs a saliency map, but there is none")
        return self.saliency

    def rgb(self) -> NDArray[np.uint8]:
        """The H x W x 3 image.

        Raises:
            ValueError: there is no image.
        """
        if self.image is None:
            raise ValueError("the rule's CRF needs the image, but there is none")
        return self.image


class Rule(ABC):
    """A label rule and its settings. Subclasses are frozen dataclasses."""

    @property
    def needs_saliency(self) -> bool:
        """Whether ``label`` reads the saliency map."""
        return False

    @property
    def needs_image(self) -> bool:
        """Whether ``label`` reads the image."""
        return False

    @abstractmethod
    def label(self, cues: Cues) -> Raster:
        """Return the H x W uint8 label map."""

    @abstractmethod
    def describe(self) -> str:
        """Summarise the settings for the report, e.g. 'background 1 - saliency, dense CRF off'."""


@dataclass(frozen=True)
class LabelCrf(Crf):
    """Dense CRF that refines the scores of background and tags before each pixel gets its label."""

    confidence: Share = 0.0  # pixels whose highest marginal is below it are ignored


@dataclass(frozen=True, kw_only=True)
class CrfRule(Rule):
    """A rule with an optional CRF on its scores."""

    crf: LabelCrf | None = None

    @property
    def needs_image(self) -> bool:
        return self.crf is not None

    def refine(self, scores: Scores, cues: Cues) -> tuple[Scores, Mask]:
        """Apply the CRF, if there is one.

        Args:
            scores: (1 + C) x H x W, background first.

        Returns:
            The CRF's marginals and the H x W mask of pixels whose highest marginal is below ``crf.confidence``; without
            a CRF, the scores and an empty mask.

        Raises:
            ValueError: the CRF needs the image, but ``cues`` has none.
        """
        if self.crf is None:
            return scores, np.zeros(scores.shape[1:], np.bool_)
        marginals = dense_crf(cues.rgb(), as_probabilities(scores), self.crf)
        return marginals, marginals.max(axis=0) < self.crf.confidence

    def decide(self, scores: Scores, cues: Cues) -> tuple[NDArray[np.intp], Mask]:
        """H x W channel of the highest score after ``refine`` (the first of equals), and the mask of ``refine``."""
        refined, unsure = self.refine(scores, cues)
        return refined.argmax(axis=0), unsure

    def summary(self, *parts: str) -> str:
        """Join ``parts`` and a description of the CRF with commas."""
        return ", ".join([*parts, f"dense CRF {describe_crf(self.crf)}"])


def as_probabilities(scores: Scores) -> Scores:
    """Divide scores, clipped below at ``FLOOR``, by their sum over classes; all-zero pixels become uniform."""
    floored = np.maximum(scores, np.float32(FLOOR))
    floored /= floored.sum(axis=0)
    return floored


def as_labels(winners: NDArray[np.intp], ignored: Mask, classes: tuple[int, ...]) -> Raster:
    """Map H x W channel numbers (0: background, then ``classes``) to class ids; ``ignored`` pixels become 255."""
    labels = np.asarray((0, *classes), np.uint8)[winners]
    labels[ignored] = IGNORE
    return labels
