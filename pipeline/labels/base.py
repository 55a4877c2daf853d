"""What a label rule is: it turns the class scores, saliency and colours of one image into a label map.

A rule registers itself in its own file (``@RULES.register("drs")``); its settings are its fields. Label maps are uint8:
0 background, 1..K classes, 255 ignored. No module of this package imports torch.
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
    """The evidence for the labels of one image.

    Attributes:
        classes: ids of the image's tags, ascending.
        scores: C x H x W in [0, 1], one channel a class.
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
        """H x W, 1 - saliency, rounded as class scores are.

        Raises:
            ValueError: there is no saliency map.
        """
        return np.divide(255 - self._saliency(), 255, dtype=np.float32)

    def _saliency(self) -> Raster:
        if self.saliency is None:
            raise ValueError("the rule needs a saliency map, and there is none")
        return self.saliency

    def rgb(self) -> NDArray[np.uint8]:
        """The image.

        Raises:
            ValueError: there is none.
        """
        if self.image is None:
            raise ValueError("the rule's CRF needs the image, and there is none")
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
        """The H x W uint8 label map."""

    @abstractmethod
    def describe(self) -> str:
        """What the report says after the rule's name, such as 'background 1 - saliency, dense CRF off'."""


@dataclass(frozen=True)
class LabelCrf(Crf):
    """A dense CRF on the scores of background and tags, before the label is chosen."""

    confidence: Share = 0.0  # pixels whose highest marginal is below it are ignored


@dataclass(frozen=True, kw_only=True)
class CrfRule(Rule):
    """A rule whose scores a CRF may refine."""

    crf: LabelCrf | None = None

    @property
    def needs_image(self) -> bool:
        return self.crf is not None

    def refined(self, scores: Scores, cues: Cues) -> tuple[Scores, Mask]:
        """The CRF's marginals, and where the highest is below ``crf.confidence``; without a CRF, the scores.

        Args:
            scores: (1 + C) x H x W, the background's first.

        Raises:
            ValueError: the CRF needs the image, and there is none.
        """
        if self.crf is None:
            return scores, np.zeros(scores.shape[1:], np.bool_)
        marginals = dense_crf(cues.rgb(), as_probabilities(scores), self.crf)
        return marginals, marginals.max(axis=0) < self.crf.confidence

    def decide(self, scores: Scores, cues: Cues) -> tuple[NDArray[np.intp], Mask]:
        """Each pixel's channel of the highest (refined) score, and where the CRF is unsure; ties go to the first."""
        found, unsure = self.refined(scores, cues)
        return found.argmax(axis=0), unsure

    def described(self, *parts: str) -> str:
        """``parts`` and the CRF, separated by commas."""
        return ", ".join([*parts, f"dense CRF {describe_crf(self.crf)}"])


def as_probabilities(scores: Scores) -> Scores:
    """Scores divided by their sum. None is below ``FLOOR``, and where all are 0 every class is equally likely."""
    floored = np.maximum(scores, np.float32(FLOOR))
    floored /= floored.sum(axis=0)
    return floored


def as_labels(winners: NDArray[np.intp], ignored: Mask, classes: tuple[int, ...]) -> Raster:
    """H x W channels (0: background, then ``classes``) as class ids, with 255 where ``ignored``."""
    labels = np.asarray((0, *classes), np.uint8)[winners]
    labels[ignored] = IGNORE
    return labels
