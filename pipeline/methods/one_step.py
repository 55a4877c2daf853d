"""The base of all one-step networks, which learn segmentation from tags in one training."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from pipeline.config.schema import OneStep

Mapper = Callable[..., Iterable[Any]]  # ``map``, or an equivalent over worker processes


def backbone_faults(block: OneStep, *names: str) -> Iterator[str]:
    """Yield a line for each backbone in ``names`` that the block lacks, and for each one that is not in ``names``."""
    expected = ", ".join(names)
    yield from (f"backbones.{name}: is missing" for name in names if name not in block.backbones)
    yield from (
        f"backbones.{name}: is none of {expected}; remove it, or set it to null"
        for name in block.backbones
        if name not in names
    )


class OneStepNetwork(nn.Module, ABC):
    """Base of all one-step networks. A new one is a subclass in a file of its own, registered there in ``ONE_STEP``.

    ``Settings`` is a frozen dataclass of the keys below ``network.NAME``; annotations give their ranges. It may define
    ``faults()``, which yields a line for each contradiction among the settings, and ``faults_in(block)``, which yields
    a line for each contradiction with the rest of the block and includes ``backbone_faults``.

    Args:
        block: the network's block of params.yaml.
        num_classes: K, without background.
    """

    map_name = "Probability"  # name of the maps of ``localize`` in the report

    @dataclass(frozen=True)
    class Settings:
        """This network has no settings."""

    settings: Any  # an instance of ``Settings``

    def __init__(self, block: OneStep, num_classes: int) -> None:
        super().__init__()
        self.block = block
        self.settings = block.network.settings
        self.num_classes = num_classes

    @property
    def uses_mapper(self) -> bool:
        """Whether ``losses`` runs CPU work through ``mapper``, which then has worker processes."""
        return False

    @abstractmethod
    def describe(self) -> str:
        """Describe the network and its settings, without the backbones, for the report."""

    def describe_labels(self) -> str:
        """Describe the labels that the masks are learned from, for the report."""
        return "on the fly"

    def about(self) -> dict[str, str]:
        """The report's description of this network; training writes it to log.json."""
        parts = [self.describe(), *(backbone.describe() for backbone in self.block.backbones.values())]
        return {"text": ", ".join(parts), "map_name": self.map_name, "labels": self.describe_labels()}

    @abstractmethod
    def new_layers(self) -> Iterable[nn.Module]:
        """The layers added to the backbones."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Map B x 3 x H x W images to B x (K + 1) x h x w logits, background first, in float32."""

    @abstractmethod
    def losses(self, images: Tensor, tags: Tensor, epoch: int, mapper: Mapper = map) -> dict[str, Tensor]:
        """Compute the weighted terms of the loss, as scalars by name.

        Training minimises their sum and logs the mean of each term. Every call returns the same names.

        Args:
            images: B x 3 x H x W, normalised.
            tags: B x K, 0 or 1.
            epoch: 0-based.
            mapper: ``map``, or an equivalent over worker processes; see ``uses_mapper``.
        """

    def localize(self, images: Tensor) -> Tensor:
        """Probabilities of the object classes, B x K x h x w, from which a second training can derive labels."""
        return cast(Tensor, self(images)).softmax(1)[:, 1:]

    def logged(self) -> dict[str, float]:
        """Further values by name, logged at the end of each epoch."""
        return {}
