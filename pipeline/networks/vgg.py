"""VGG-16 (Simonyan and Zisserman 2014) without pool5 and the fully connected layers, as in OAA and DRS."""

from torch import nn

from pipeline.config import schema
from pipeline.config.registry import BACKBONES
from pipeline.errors import PipelineError
from pipeline.networks.base import Backbone, Tap, he_normal
from pipeline.networks.published import TorchvisionWeights

STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))  # convolutions, channels


@BACKBONES.register("vgg16")
def vgg16(settings: schema.Backbone) -> Backbone:
    """Build VGG-16 with taps conv1_2, conv2_2, conv3_3, conv4_3 and conv5_3, each after its ReLU.

    At ``output_stride`` 8, pools 1 to 3 halve the resolution, pool4 is a 3x3 pool with stride 1, and conv5 has dilation
    2 (320 x 320 -> 40 x 40). Pools round sizes up, which gives DeepLab's 41 x 41 features for 321 x 321 images.

    Raises:
        PipelineError: the output stride is 32, which would require pool5.
    """
    if settings.output_stride > 16:
        raise PipelineError(f"vgg16: output_stride {settings.output_stride} is too large; use 4, 8 or 16")
    stages: dict[str, nn.Module] = {}
    taps: dict[str, Tap] = {}
    channels, stride, dilation = 3, 1, 1
    index = 0  # of the layer in torchvision's vgg16().features; the layers have the same names
    for number, (convs, width) in enumerate(STAGES, 1):
        layers: list[nn.Module] = []
        if number > 1:
            if stride * 2 <= settings.output_stride:
                layers.append(nn.MaxPool2d(2, 2, ceil_mode=True))
                stride *= 2
            else:
                layers.append(nn.MaxPool2d(3, 1, padding=1))
                dilation *= 2 if settings.dilated else 1
        for _ in range(convs):
            layers += [nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True)]
            channels = width
        name = f"conv{number}_{convs}"
        stages[name] = nn.Sequential()
        for layer in layers:
            stages[name].add_module(str(index), layer)
            index += 1
        taps[name] = Tap(width, stride)
    backbone = Backbone(
        stages,
        taps,
        settings.frozen_batch_norm,
        (nn.ReLU,),
        published=TorchvisionWeights("VGG16_Weights", "features."),
        ends_before_pool=True,
    )
    he_normal(backbone)
    return backbone
