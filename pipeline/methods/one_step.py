"""What a one-step network is: it learns masks from tags in one training."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from pipeline.config.schema import OneStep

Mapper = Callable[..., Iterable[Any]]  # ``map``, or one over worker processes


def wrong_backbones(block: OneStep, *names: str) -> Iterator[str]:
    """A line for each backbone that is missing from the block, or that a network with these does not have."""
    wanted = ", ".join(names)
    yield from (f"backbones.{name}: is missing" for name in names if name not in block.backbones)
    yield from (
        f"backbones.{name}: is none of {wanted}; remove it, or set it to null"
        for name in block.backbones
        if name not in names
    )


class OneStepNetwork(nn.Module, ABC):
    """Base of all one-step networks. A new one is a subclass in a file of its own, registered in ``ONE_STEP``.

    ``Settings`` is a frozen dataclass of what a block may set below ``network.NAME``, ranges beside the fields;
    ``faults()`` yields a line for each contradiction among them, ``faults_in(block)`` a line for each one with the rest
    of the block, first of all ``wrong_backbones``.

    Args:
        block: of params.yaml.
        num_classes: K, without background.
    """

    map_name = "Probability"  # what the report calls the maps of ``localize``

    @dataclass(frozen=True)
    class Settings:
        """There are none."""

    settings: Any  # an instance of ``Settings``

    def __init__(self, block: OneStep, num_classes: int) -> None:
        super().__init__()
        self.block = block
        self.settings = block.network.settings
        self.num_classes = num_classes

    @property
    def uses_mapper(self) -> bool:
        """Whether ``losses`` hands work of the processor's to ``mapper``, which then gets worker processes."""
        return False

    @abstractmethod
    def describe(self) -> str:
        """The network and its settings, without the backbones, for the report."""

    def describe_labels(self) -> str:
        """What the masks are learned from, for the report."""
        return "on the fly"

    def about(self) -> dict[str, str]:
        """What the report shows of this network; the training writes it into its log."""
        parts = [self.describe(), *(backbone.describe() for backbone in self.block.backbones.values())]
        return {"text": ", ".join(parts), "map_name": self.map_name, "labels": self.describe_labels()}

    @abstractmethod
    def new_layers(self) -> Iterable[nn.Module]:
        """The layers added to the backbones."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """B x 3 x H x W images to B x (K + 1) x h x w logits, background first, in float32."""

    @abstractmethod
    def losses(self, images: Tensor, tags: Tensor, epoch: int, mapper: Mapper = map) -> dict[str, Tensor]:
        """The weighted terms of the loss by name, scalars: their sum is trained on, and the log has each one's mean.

        Every call returns the same names.

        Args:
            images: B x 3 x H x W, normalised.
            tags: B x K, 0 or 1.
            epoch: counted from 0.
            mapper: ``map``, or one over worker processes; see ``uses_mapper``.
        """

    def localize(self, images: Tensor) -> Tensor:
        """B x K x h x w probabilities of the object classes: the labels' source in the two-step form."""
        return cast(Tensor, self(images)).softmax(1)[:, 1:]

    def logged(self) -> dict[str, float]:
        """Further numbers by name, for the log at the end of each epoch."""
        return {}
