"""Class activation maps from a class-aware convolution (CAM; the classification network of OAA Sec. 3.1)."""

from collections.abc import Iterable

from torch import Tensor, nn

from pipeline.config.registry import METHODS
from pipeline.config.schema import Classifier
from pipeline.methods.base import Method, Output, occlude
from pipeline.networks.backbones import build_backbone
from pipeline.networks.heads import ClassAwareHead


@METHODS.register("cam")
class Cam(Method):
    """Backbone, 3x3 convolutions, 1x1 class-aware convolution, global average pooling (OAA Eq. 1)."""

    map_name = "CAM"

    def __init__(self, block: Classifier, num_classes: int) -> None:
        super().__init__(block, num_classes)
        self.backbone = build_backbone(block.backbone)
        self.head = ClassAwareHead(self.backbone.out_channels, block.head, num_classes)

    def describe(self) -> str:
        return "CAM"

    @property
    def is_mean(self) -> bool:
        return True

    def new_layers(self) -> Iterable[nn.Module]:
        return [self.head, self.suppressors]

    def layers(self) -> dict[str, list[nn.Module]]:
        """The backbone's layers, and 'head' for the 3x3 convolutions if there are any."""
        activations: list[nn.Module] = [module for module in self.head.convs if isinstance(module, nn.ReLU)]
        return self.backbone.layers() | ({"head": activations} if activations else {})

    def forward(self, images: Tensor, occluded: Tensor | None = None) -> Output:
        features = occlude(self.head.penultimate(self.backbone(images)), occluded)
        maps = self.head.classify(features)
        return Output(maps.float().mean((2, 3)), maps)
