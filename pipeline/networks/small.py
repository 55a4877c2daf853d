"""The backbone of the demo, small enough to train from scratch in half a minute on a CPU core."""

from torch import nn

from pipeline.config import schema
from pipeline.config.registry import BACKBONES
from pipeline.errors import PipelineError
from pipeline.networks.base import Backbone, Tap, he_normal, limit_stride

WIDTHS = (32, 32, 64, 64, 128, 128)
STRIDES = (2, 2, 1, 1, 2, 1)  # at full resolution, one convolution would take as long as three at a quarter of it
KERNELS = (5, 3, 3, 3, 3, 3)


@BACKBONES.register("small")
def small(settings: schema.Backbone) -> Backbone:
    """Build six convolutions, 5x5 and then 3x3, with batch norm and ReLU.

    Taps conv2, conv4 and conv6 have 32, 64 and 128 channels.

    Raises:
        PipelineError: the output stride is neither 4 nor 8.
    """
    if settings.output_stride > 8:
        raise PipelineError(f"small: output_stride {settings.output_stride} is too large; use 4 or 8")
    blocks = [
        nn.Sequential(
            nn.Conv2d(before, width, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        for before, width, kernel, stride in zip((3, *WIDTHS[:-1]), WIDTHS, KERNELS, STRIDES, strict=True)
    ]
    strides = limit_stride(blocks, 1, settings.output_stride, settings.dilated)
    stages = {f"conv{end}": nn.Sequential(*blocks[end - 2 : end]) for end in (2, 4, 6)}
    taps = {f"conv{end}": Tap(WIDTHS[end - 1], strides[end - 1]) for end in (2, 4, 6)}
    backbone = Backbone(stages, taps, settings.frozen_batch_norm, (nn.ReLU,))
    he_normal(backbone)
    return backbone
