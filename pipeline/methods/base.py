"""What a method is: a classifier whose class-aware maps can be read off."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.schema import Classifier


class Output(NamedTuple):
    """``logits`` B x K; ``maps`` B x K x h x w, the raw class-aware feature maps F (OAA Sec. 3.1)."""

    logits: Tensor
    maps: Tensor


class Method(nn.Module):
    """Base of all methods. A new one is a subclass in a file of its own and a line in ``METHODS``."""

    def __init__(self, settings: Classifier, num_classes: int) -> None:
        super().__init__()
        self.settings = settings
        self.num_classes = num_classes
        self.suppressors = nn.ModuleList()  # of DRS, where ``settings.suppression`` asks for it

    def new_layers(self) -> Iterable[nn.Module]:
        """The layers added to the backbone."""
        raise NotImplementedError

    def layers(self) -> dict[str, list[nn.Module]]:
        """By name, shallow to deep, the modules whose outputs are features: those of the backbone's taps, and more."""
        raise NotImplementedError

    def forward(self, images: Tensor, occluded: Tensor | None = None) -> Output:
        """Classify B x 3 x H x W images; features are zeroed where ``occluded`` (B x 1 x H x W, bool) holds."""
        raise NotImplementedError

    def loss(self, output: Output, tags: Tensor) -> Tensor:
        """Scalar classification loss against B x K tags."""
        return torch.nn.functional.binary_cross_entropy_with_logits(output.logits.float(), tags)

    def localize(self, images: Tensor) -> Tensor:
        """B x K x h x w non-negative maps for localization, not normalised."""
        return self(images).maps.float().relu()
