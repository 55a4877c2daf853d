"""The head of DeepLab-v2 (Chen et al. 2017): atrous spatial pyramid pooling."""

from typing import cast

from torch import Tensor, nn

from pipeline import schema
from pipeline.errors import PipelineError
from pipeline.networks.base import Backbone
from pipeline.networks.heads import normal
from pipeline.networks.segmentation_head import SegmentationHead


class Aspp(SegmentationHead):
    """The sum of parallel dilated 3x3 convolutions, one a rate, straight to the scores; each starts from N(0, 0.01).

    ``channels`` and ``dropout`` have no part in it.

    Raises:
        PipelineError: there are no ``rates``.
    """

    def __init__(self, backbone: Backbone, settings: schema.Segmentation, outputs: int) -> None:
        super().__init__(list(backbone.taps)[-1])
        if not settings.rates:
            raise PipelineError(f"rates: is empty; {settings.network} takes one dilation for each parallel convolution")
        self.branches = nn.ModuleList(
            nn.Conv2d(backbone.out_channels, outputs, 3, padding=rate, dilation=rate) for rate in settings.rates
        )
        for branch in self.branches:
            normal(cast(nn.Conv2d, branch))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, sum(branch(x) for branch in self.branches))
