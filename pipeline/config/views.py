"""The part of the schema that describes the maps of trained networks on whole images, and the boxes drawn from them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pipeline.config.reader import Count, NonNegative, NonNegativeInt, Positive, Range, Scale, Share


@dataclass(frozen=True)
class Climbing:
    """Anti-adversarial climbing (AdvCAM).

    The image is changed step by step to increase the score of its tag, and the maps of all steps are summed. AMR's
    published numbers use it, although its paper does not mention it.
    """

    iterations: NonNegativeInt = 27
    step: Positive = 0.08  # largest change of any value in a step, in units of the normalised input
    weight: NonNegative = 7.0  # of the term that suppresses growth in regions attended already
    threshold: Share = 0.5  # fraction of a map's maximum above which a pixel counts as attended already


@dataclass(frozen=True)
class Views:
    """The maps of a trained network on whole images: its inputs, their fusion and the stored grid."""

    model: str  # SECTION/NAME
    side: Literal["short", "long", "square", "none"] = "none"
    length: Count | None = None  # pixels
    scales: tuple[Scale, ...] = (1.0,)
    flip: bool = False
    fusion: Literal["mean", "max"] = "mean"
    stride: Count = 4  # image pixels per stored cell
    # The resizing of maps to these cells: between the outermost centres (DRS's code, at stride 1), or between the edges
    align_corners: bool = False

    def faults(self) -> Iterator[str]:
        if self.side != "none" and self.length is None:
            yield f"length: is missing; side {self.side} needs it"
        if not self.scales:
            yield "scales: is empty; add at least one"


@dataclass(frozen=True)
class Localization(Views):
    """Localization maps of the training images. ``model``: classifiers/NAME, refinements/NAME or one_step/NAME."""

    normalise: Literal["max", "none"] = "max"  # none: clip to 1 instead, for networks that regress values
    climbing: Climbing | None = None  # only for a classifier

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.climbing is not None and not self.model.startswith("classifiers/"):
            yield f"climbing: {self.model} is not a classifier; set climbing to null"


@dataclass(frozen=True)
class Boxes(Views):
    """Object boxes in the evaluation images, drawn from maps of their highest classes. ``model``: classifiers/NAME."""


@dataclass(frozen=True)
class BoxTest:
    """The evaluation of all boxes (OAA Sec. 4.5)."""

    threshold: Annotated[float, Range(least=0, below=1)] = 0.2  # of a map's maximum, above which a box is drawn (CAM)
    # The boxes of a mask. single: only images whose object pixels form one component of one class; class: one box
    # around all pixels of each tagged class. dataset.boxes replaces the masks
    masks: Literal["single", "class"] = "single"
