"""The head that turns a backbone into an image-level classifier with class-aware maps."""

from typing import cast

from torch import Tensor, nn

from pipeline.config import schema
from pipeline.networks.base import he_normal


class ClassAwareHead(nn.Module):
    """3x3 convolutions with ReLU, then a 1x1 convolution with one channel a class (OAA Sec. 3.1).

    ``convs`` is the sequence of 3x3 convolutions and ReLUs, ``classifier`` the class-aware convolution. The 3x3
    convolutions start from He's normal, so that they also train from scratch, the classifier from N(0, 0.01).

    Args:
        in_channels: of the backbone's features.
        num_classes: K, without background.
    """

    def __init__(self, in_channels: int, settings: schema.Head, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for _ in range(settings.convs):
            layers += [nn.Conv2d(channels, settings.channels, 3, padding=1), nn.ReLU(inplace=True)]
            channels = settings.channels
        self.convs = nn.Sequential(*layers)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        he_normal(self.convs)
        normal(self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        """B x C x h x w features to B x K x h x w class-aware maps; their spatial mean is the logit of each class."""
        return self.classify(self.penultimate(x))

    def penultimate(self, x: Tensor) -> Tensor:
        """The features that ``classify`` takes, B x ``channels`` x h x w."""
        return cast(Tensor, self.convs(x))

    def classify(self, features: Tensor) -> Tensor:
        """The class-aware maps of ``penultimate``'s features."""
        return cast(Tensor, self.classifier(features))


def normal(conv: nn.Conv2d, std: float = 0.01) -> None:
    """Initialise a layer of scores: weights N(0, ``std``), bias 0."""
    nn.init.normal_(conv.weight, std=std)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
