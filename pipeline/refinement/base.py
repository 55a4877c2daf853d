"""What a refinement network is: the classification network without pooling, trained on maps pixel by pixel."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from pipeline.config.schema import Refinement
from pipeline.networks.backbones import build_backbone
from pipeline.networks.heads import ClassAwareHead

Target = Callable[[tuple[int, int]], Tensor]  # (h, w) -> B x K x h x w maps in [0, 1]; 0 for absent classes


class RefinementNetwork(nn.Module, ABC):
    """Backbone, 3x3 and 1x1 class-aware convolutions. A new one is a subclass in a file of its own, which registers it
    in ``REFINEMENTS``.

    ``Settings`` is a frozen dataclass of what a block may set below ``network.NAME``, ranges beside the fields;
    ``faults()`` yields a line for each contradiction among them, ``faults_in(block)`` a line for each one with the rest
    of the block.
    """

    map_name = "Refined map"  # what the report calls the maps of ``localize``

    @dataclass(frozen=True)
    class Settings:
        """There are none."""

    settings: Any  # an instance of ``Settings``

    def __init__(self, block: Refinement, num_classes: int) -> None:
        super().__init__()
        self.block = block
        self.settings = block.network.settings
        self.backbone = build_backbone(block.backbone)
        self.head = ClassAwareHead(self.backbone.out_channels, block.head, num_classes)

    @abstractmethod
    def describe(self) -> str:
        """The network, without the backbone, for the report."""

    def about(self) -> dict[str, str]:
        """What the report shows of this network; the training writes it into its log."""
        return {"text": f"{self.describe()} {self.block.backbone.describe()}", "map_name": self.map_name}

    def new_layers(self) -> Iterable[nn.Module]:
        """The layers added to the backbone."""
        return [self.head]

    def forward(self, images: Tensor) -> Tensor:
        """B x 3 x H x W -> B x K x h x w raw values of the class-aware convolution."""
        return cast(Tensor, self.head(self.backbone(images)))

    @abstractmethod
    def loss(self, images: Tensor, target: Target, tags: Tensor) -> Tensor:
        """Scalar loss of B x 3 x H x W images against the maps that ``target`` gives at any size, and B x K tags."""

    def localize(self, images: Tensor) -> Tensor:
        """B x K x h x w non-negative maps: the values' positive part (the public code of OAA+ and DRS)."""
        return cast(Tensor, self(images)).float().relu()
