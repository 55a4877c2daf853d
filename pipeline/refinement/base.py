"""The base of all refinement networks: classification networks without pooling, trained on maps pixel by pixel."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from pipeline.config.schema import Refinement
from pipeline.networks.backbones import build_backbone
from pipeline.networks.heads import ClassAwareHead

Target = Callable[[tuple[int, int]], Tensor]  # (h, w) -> B x K x h x w maps in [0, 1] on the device


class RefinementNetwork(nn.Module, ABC):
    """Base of all refinement networks: a backbone and a class-aware head.

    A new network is a subclass in a file of its own, registered there in ``REFINEMENTS``.

    ``Settings`` is a frozen dataclass of the keys below ``network.NAME``; annotations give their ranges. It may define
    ``faults()``, which yields a line for each contradiction among the settings, and ``faults_in(block)``, which yields
    a line for each contradiction with the rest of the block.
    """

    map_name = "Refined map"  # name of the maps of ``localize`` in the report

    @dataclass(frozen=True)
    class Settings:
        """This network has no settings."""

    settings: Any  # an instance of ``Settings``

    def __init__(self, block: Refinement, num_classes: int) -> None:
        super().__init__()
        self.block = block
        self.settings = block.network.settings
        self.backbone = build_backbone(block.backbone)
        self.head = ClassAwareHead(self.backbone.out_channels, block.head, num_classes)

    @abstractmethod
    def describe(self) -> str:
        """Describe the network, without the backbone, for the report."""

    def about(self) -> dict[str, str]:
        """The report's description of this network; training writes it to log.json."""
        return {"text": f"{self.describe()} {self.block.backbone.describe()}", "map_name": self.map_name}

    @property
    def is_mean(self) -> bool:
        """Whether the loss of a batch is the mean of its images' losses, so that batches may be merged."""
        return False

    def new_layers(self) -> Iterable[nn.Module]:
        """The layers added to the backbone."""
        return [self.head]

    def forward(self, images: Tensor) -> Tensor:
        """Map B x 3 x H x W images to the raw outputs of the class-aware convolution, B x K x h x w."""
        return cast(Tensor, self.head(self.backbone(images)))

    @abstractmethod
    def loss(self, images: Tensor, target: Target, tags: Tensor) -> Tensor:
        """Scalar loss of B x 3 x H x W images with B x K tags; ``target(size)`` returns the target maps at a size."""

    def localize(self, images: Tensor) -> Tensor:
        """Non-negative maps, B x K x h x w: the positive part of the outputs (the public code of OAA+ and DRS)."""
        return cast(Tensor, self(images)).float().relu()
