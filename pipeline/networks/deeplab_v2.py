"""DeepLab-v2 (Chen et al. 2017): atrous spatial pyramid pooling (ASPP) and multi-scale input."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from pipeline.config.reader import Count, Scale
from pipeline.config.registry import SEGMENTATIONS
from pipeline.networks.base import Backbone
from pipeline.networks.heads import normal
from pipeline.networks.segmentation import SegmentationHead


@SEGMENTATIONS.register("deeplab_v2")
class DeepLabV2(SegmentationHead):
    """The sum of parallel dilated 3x3 convolutions, one per rate, which output the logits; all start at N(0, 0.01)."""

    @dataclass(frozen=True)
    class Settings:
        """The default rates are the published ones. Extra scales are off by default (published: 0.75, 0.5)."""

        rates: tuple[Count, ...] = (6, 12, 18, 24)  # dilations of the parallel convolutions
        # Extra scales of the input. The prediction is the pixel-wise maximum of the logits over all scales.
        extra_scales: tuple[Scale, ...] = ()

        def faults(self) -> Iterator[str]:
            if not self.rates:
                yield "rates: is empty; state one dilation for each parallel convolution"

        def describe(self) -> str:
            scales = f", scales {', '.join(f'{scale:g}' for scale in (1, *self.extra_scales))}"
            rates = ", ".join(map(str, self.rates))
            return f"DeepLab-v2 (rates {rates}{scales if self.extra_scales else ''})"

    def __init__(self, backbone: Backbone, settings: Settings, outputs: int) -> None:
        super().__init__(list(backbone.taps)[-1])
        self.extra_scales = settings.extra_scales
        self.branches = nn.ModuleList(
            nn.Conv2d(backbone.out_channels, outputs, 3, padding=rate, dilation=rate) for rate in settings.rates
        )
        for branch in self.branches:
            normal(cast(nn.Conv2d, branch))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, sum(branch(x) for branch in self.branches))
