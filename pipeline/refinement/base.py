"""What a refinement network is: the classification network without pooling, trained on maps pixel by pixel."""

from collections.abc import Callable, Iterable
from typing import cast

from torch import Tensor, nn

from pipeline.networks.backbones import build_backbone
from pipeline.networks.heads import ClassAwareHead
from pipeline.schema import Refinement

Target = Callable[[tuple[int, int]], Tensor]  # (h, w) -> B x K x h x w maps in [0, 1]; 0 for absent classes


class RefinementNetwork(nn.Module):
    """Backbone, 3x3 and 1x1 class-aware convolutions. A new one is a subclass and a line in ``REFINEMENTS``."""

    def __init__(self, settings: Refinement, num_classes: int) -> None:
        super().__init__()
        self.settings = settings
        self.backbone = build_backbone(settings.backbone)
        self.head = ClassAwareHead(self.backbone.out_channels, settings.head, num_classes)

    def new_layers(self) -> Iterable[nn.Module]:
        """The layers added to the backbone."""
        return [self.head]

    def forward(self, images: Tensor) -> Tensor:
        """B x 3 x H x W -> B x K x h x w raw values of the class-aware convolution."""
        return cast(Tensor, self.head(self.backbone(images)))

    def loss(self, images: Tensor, target: Target, tags: Tensor) -> Tensor:
        """Scalar loss against the maps that ``target`` gives at any size, and B x K tags."""
        raise NotImplementedError

    def localize(self, images: Tensor) -> Tensor:
        """B x K x h x w non-negative maps: the values' positive part (the public code of OAA+ and DRS)."""
        return cast(Tensor, self(images)).float().relu()
