"""Localization map refinement learning (DRS, section of that name): a network that regresses maps."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.registry import REFINEMENTS
from pipeline.config.schema import Refinement
from pipeline.networks.heads import normal
from pipeline.refinement.base import RefinementNetwork, Target


def strongest(maps: Tensor) -> Tensor:
    """B x K x H x W maps in which each pixel keeps only its strongest class (DRS's public code); ties keep all."""
    return maps * (maps == maps.amax(1, keepdim=True))


@REFINEMENTS.register("regression")
class RegressionNetwork(RefinementNetwork):
    """The refinement network of DRS: linear outputs and the mean squared error over classes and pixels.

    The target is each pixel's strongest class alone (``target: strongest``, the public code) or all classes ('full',
    the paper). With ``reduction: class`` the error is the mean over all K classes (paper and code); with 'pooled' over
    the image's tags alone, the only classes whose maps are ever used: of 20 classes 18 are 0 in an image of VOC, and a
    short training of all of them learns little but that. The outputs are upsampled to the input, as in the public code.
    Outputs are unbounded: take its maps with ``normalise: none``, which cuts them at 0 and 1, so that a weak map stays
    weak.
    """

    @dataclass(frozen=True)
    class Settings:
        """Of the loss."""

        reduction: Literal["class", "pooled"] = "class"  # the mean over all classes (paper, code), or the tagged ones
        target: Literal["strongest", "full"] = "strongest"  # a pixel's strongest class (code), or all (paper)

    settings: Settings

    def __init__(self, block: Refinement, num_classes: int) -> None:
        super().__init__(block, num_classes)
        for conv in self.head.convs:
            if isinstance(conv, nn.Conv2d):
                normal(conv)

    def describe(self) -> str:
        return "regression"

    def loss(self, images: Tensor, target: Target, tags: Tensor) -> Tensor:
        height, width = images.shape[2:]
        values = functional.interpolate(
            self(images).float(), size=(height, width), mode="bilinear", align_corners=False
        )
        maps = target((height, width)).to(values.device)
        errors = (values - (strongest(maps) if self.settings.target == "strongest" else maps)).square().mean((2, 3))
        return errors.mean() if self.settings.reduction == "class" else (errors * tags).sum() / tags.sum()
