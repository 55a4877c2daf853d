"""Localization map refinement learning (DRS, section of that name): a network that regresses maps."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.registry import REFINEMENTS
from pipeline.config.schema import Refinement
from pipeline.networks.heads import normal
from pipeline.refinement.base import RefinementNetwork, Target
from pipeline.training.distributed import ratio


def strongest(maps: Tensor) -> Tensor:
    """Set all but the strongest class of each pixel of B x K x H x W maps to 0 (DRS's public code); ties stay."""
    return maps * (maps == maps.amax(1, keepdim=True))


@REFINEMENTS.register("regression")
class RegressionNetwork(RefinementNetwork):
    """The refinement network of DRS: linear outputs and the mean squared error over classes and pixels.

    The target keeps only each pixel's strongest class (``target: strongest``, the public code) or all classes ('full',
    the paper). With ``reduction: class`` the error is the mean over all K classes (paper and code). With 'pooled' it is
    the mean over the image's tags, the only classes whose maps are used: 18 of 20 classes are 0 in a typical VOC image,
    and a short training on all classes learns little else. The outputs are upsampled to the input, as in the public
    code. They are unbounded, so localize with ``normalise: none``, which clips maps to [0, 1] and keeps weak maps weak.
    """

    @dataclass(frozen=True)
    class Settings:
        """Settings of the loss."""

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

    @property
    def is_mean(self) -> bool:
        return self.settings.reduction == "class"

    def loss(self, images: Tensor, target: Target, tags: Tensor) -> Tensor:
        outputs = self(images).float()
        size = int(images.shape[2]), int(images.shape[3])
        maps = target(size)
        if self.settings.target == "strongest":
            maps = strongest(maps)
        if self.settings.reduction == "class":
            return (_upsampled(outputs, size) - maps).square().mean((2, 3)).mean()
        if outputs.device.type == "cpu":  # only the tagged classes are upsampled, a small part of all
            tagged = tags.nonzero(as_tuple=True)
            errors = (_upsampled(outputs[tagged][:, None], size)[:, 0] - maps[tagged]).square().mean((1, 2))
        else:  # selecting these would make the CPU wait for the GPU to count them
            errors = tags * (_upsampled(outputs, size) - maps).square().mean((2, 3))
        return ratio(errors.sum(), tags.sum())


def _upsampled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)
