"""The head of an image-level classifier with class-aware maps, and the initialisation of score layers."""

from typing import cast

from torch import Tensor, nn

from pipeline.config import schema
from pipeline.networks.base import he_normal


class ClassAwareHead(nn.Module):
    """3x3 convolutions with ReLU, then a 1x1 convolution with one channel per class (OAA Sec. 3.1).

    ``convs`` holds the 3x3 convolutions, batch norms if enabled, and ReLUs; ``classifier`` is the class-aware
    convolution. The 3x3 convolutions use He's normal initialisation, so that they also train from scratch. The
    classifier starts at N(0, 0.01).

    Args:
        in_channels: channels of the backbone's features.
        num_classes: K, without background.
    """

    def __init__(self, in_channels: int, settings: schema.Head, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for _ in range(settings.convs):
            layers.append(nn.Conv2d(channels, settings.channels, 3, padding=1))
            layers += [nn.BatchNorm2d(settings.channels)] if settings.batch_norm else []
            layers.append(nn.ReLU(inplace=True))
            channels = settings.channels
        self.convs = nn.Sequential(*layers)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        he_normal(self.convs)
        normal(self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        """Map B x C x h x w features to B x K x h x w class-aware maps, whose spatial means are the class logits."""
        return self.classify(self.penultimate(x))

    def penultimate(self, x: Tensor) -> Tensor:
        """The input features of ``classify``, B x ``channels`` x h x w."""
        return cast(Tensor, self.convs(x))

    def classify(self, features: Tensor) -> Tensor:
        """The class-aware maps, B x K x h x w, of the features that ``penultimate`` returns."""
        return cast(Tensor, self.classifier(features))


def normal(conv: nn.Conv2d, std: float = 0.01) -> None:
    """Initialise a score layer: weights from N(0, ``std``), zero bias."""
    nn.init.normal_(conv.weight, std=std)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
