"""Backbones from timm (PyTorch Image Models): ``timm:NAME``, where NAME is a network of ``timm.list_models()``.

NAME may end in a tag of timm's weights, such as 'resnet50.a1_in1k'. The tag selects the normalisation and the weights
that 'imagenet' downloads. A network qualifies if timm offers it with ``features_only`` as a chain of stages that take
an RGB image of any size. ``output_stride`` and ``dilated`` need timm's dilation; other networks have one stride only.
HRNet is used as in segmentation (HRNetV2): its four branches are concatenated at a stride of 4.

The taps are stage1, stage2, ..., at timm's feature levels. Images are normalised by ImageNet's mean and deviation
everywhere in this project; the first stage converts them to the network's own.
"""

import difflib
import importlib
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import schema
from pipeline.config.registry import BACKBONES
from pipeline.data.loading import MEAN, STD
from pipeline.errors import PipelineError, one_line
from pipeline.networks.base import Backbone, Tap
from pipeline.networks.convolutions import SameConv, rebuilt
from pipeline.networks.published import PublishedWeights
from pipeline.networks.vision import import_torchvision

# Residual blocks by module and class, and the submodules that may be the last of the residual branch: the first that
# the block has is the one whose output is added to the shortcut. Dropout of whole branches follows it, if at all.
BRANCHES: dict[str, tuple[str, ...]] = {
    "resnet.BasicBlock": ("se", "bn2"),
    "resnet.Bottleneck": ("se", "bn3"),
    "resnest.ResNestBottleneck": ("bn3",),
    "res2net.Bottle2neck": ("se", "bn3"),
    "sknet.SelectiveKernelBasic": ("se", "conv2"),
    "sknet.SelectiveKernelBottleneck": ("se", "conv3"),
    "regnet.Bottleneck": ("conv3",),
    "regnet.PreBottleneck": ("conv3",),
    "resnetv2.PreActBasic": ("conv2",),
    "resnetv2.PreActBottleneck": ("conv3",),
    "resnetv2.Bottleneck": ("norm3",),
    "convnext.ConvNeXtBlock": ("drop_path",),
    "inception_next.MetaNeXtBlock": ("drop_path",),
    "_efficientnet_blocks.ConvBnAct": ("bn1",),
    "_efficientnet_blocks.DepthwiseSeparableConv": ("bn2",),
    "_efficientnet_blocks.InvertedResidual": ("bn3",),
    "_efficientnet_blocks.CondConvResidual": ("bn3",),
    "_efficientnet_blocks.EdgeResidual": ("bn2",),
    "_efficientnet_blocks.UniversalInvertedResidual": ("layer_scale",),
}
PLAIN = ("vgg", "densenet")  # starts of the names of networks without residual blocks: layers are activations
PROBE, ODD = 64, (65, 79)  # sides of the images on which stages are measured
MULTIPLES = (8, 16, 32)  # of the sides that a stage may need, besides its stride
SHOWN = 100  # characters of an error of timm in a message


class Normalise(nn.Module):
    """Converts images normalised by ImageNet's mean and deviation to those of the network, B x 3 x H x W."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.scale: Tensor
        self.shift: Tensor
        own_mean, own_std = torch.tensor(mean, device="cpu").double(), torch.tensor(std, device="cpu").double()
        device = torch.get_default_device()
        scale, shift = torch.from_numpy(STD) / own_std, (torch.from_numpy(MEAN) - own_mean) / own_std
        self.register_buffer("scale", scale.float().view(3, 1, 1).to(device))
        self.register_buffer("shift", shift.float().view(3, 1, 1).to(device))

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale + self.shift


class Stage(nn.Sequential):
    """Modules of a timm network up to a tap.

    Some networks drop the last rows and columns of an input whose sides are no multiple of a stride (ConvNeXt), or
    refuse it (HRNet). Their inputs are padded by zeros at the bottom and right, and the outputs cropped.

    Attributes:
        stride: of the output, in pixels of the input.
        multiple: sides of the input are padded to a multiple of it.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.stride = self.multiple = 1

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if self.multiple > 1:
            x = functional.pad(x, (0, -width % self.multiple, 0, -height % self.multiple))
        x = self.run(x)
        if self.multiple > self.stride:
            x = x[:, :, : -(-height // self.stride), : -(-width // self.stride)]
        return x

    def run(self, x: Tensor) -> Tensor:
        for part in self:
            x = part(x)
        return x


class HighResolution(Stage):
    """HRNet after its stem: B x 256 x h x w features to the concatenation of all branches at h x w, as in HRNetV2."""

    def run(self, x: Tensor) -> Tensor:
        parts: dict[str, Any] = dict(self.named_children())
        branches = [x] * len(parts["transition1"])
        for number in (1, 2, 3):
            last = branches[-1]
            branches = [
                branches[index] if isinstance(transition, nn.Identity) else transition(last)
                for index, transition in enumerate(parts[f"transition{number}"])
            ]
            branches = parts[f"stage{number + 1}"](branches)
        size = list(branches[0].shape[2:])
        coarse = (functional.interpolate(each, size, mode="bilinear", align_corners=False) for each in branches[1:])
        return torch.cat([branches[0], *coarse], 1)


class TimmWeights(PublishedWeights):
    """The weights that timm publishes under ``name``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def download(self) -> tuple[str, dict[str, Tensor]]:
        timm, source = _import_timm(), f"timm:{self.name}"
        config = timm.get_pretrained_cfg(self.name)
        if not config.has_weights:
            raise PipelineError(f"{source}: timm publishes no weights of this network; set weights to a file, or null")
        try:
            network = timm.create_model(self.name, pretrained=True)
        except Exception as error:  # no network, or a damaged file in the cache
            place = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
            raise PipelineError(
                f"{source}: the download of its weights failed ({_short(error)}); set weights to a copy of {place}"
            ) from error
        return source, network.state_dict()

    def names(self, own: Collection[str]) -> Mapping[str, str]:
        """Undo timm's renaming of features: 'stages_0.' is 'stages.0.' in the whole network. Both are accepted."""
        groups = [
            (f"{name}_{child}.", f"{name}.{child}.")
            for name, module in self._whole().named_children()
            for child, _ in module.named_children()
        ]
        names = {name: name for name in own}
        for name in own:
            for flat, nested in groups:
                if name.startswith(flat):
                    names[nested + name.removeprefix(flat)] = name
        return names

    def unused(self) -> Collection[str]:
        return frozenset(self._whole().state_dict())

    def _whole(self) -> Any:
        with torch.device("meta"):
            return _import_timm().create_model(self.name.partition(".")[0])


@BACKBONES.register("timm:")
def timm_backbone(settings: schema.Backbone) -> Backbone:
    """Build the network that ``settings.name`` names, with taps stage1, stage2, ...

    Layers are the residual blocks and activations of the families in ``BRANCHES`` and ``PLAIN``. In other families
    each stage counts as one layer, since their activations cannot be told from those of attention modules.

    Raises:
        PipelineError: timm is not installed or has no such network, or the network does not qualify.
    """
    timm = _import_timm()
    name = settings.name.partition(":")[2]
    config = _config(timm, settings.name, name)
    with torch.device("meta"):
        measured = list(_measure(settings, _stages(settings, _create(timm, settings, name), config)))
    network = _create(timm, settings, name)
    types, residuals = _layer_types(network, name.startswith(PLAIN), timm.layers.BatchNormAct2d)
    stages = _stages(settings, network, config)
    taps, reached = {}, 1
    for (tap, stage), (stride, multiple, channels) in zip(stages.items(), measured, strict=True):
        stage.stride, stage.multiple = stride, multiple
        reached *= stride
        taps[tap] = Tap(channels, reached)
    constants = ("stages.stage1.normalise.scale", "stages.stage1.normalise.shift")
    return Backbone(stages, taps, settings.frozen_batch_norm, types, residuals, TimmWeights(name), constants=constants)


def _import_timm() -> ModuleType:
    import_torchvision()  # timm imports it
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError:
        raise PipelineError("timm is not installed; pip install timm, or choose another backbone") from None


def _config(timm: ModuleType, where: str, name: str) -> Any:
    """Return timm's configuration of the weights that ``name`` selects."""
    architecture, _, tag = name.partition(".")
    known = timm.list_models()
    if architecture not in known:
        close = difflib.get_close_matches(architecture, known, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists its networks"
        raise PipelineError(f"{where}: timm {timm.__version__} has no such network; {hint}")
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        choices = f"use one of {', '.join(tags)}" if tags else "leave it out"
        raise PipelineError(f"{where}: timm {timm.__version__} has no weights with the tag {tag}; {choices}")
    config = timm.get_pretrained_cfg(name)
    if config.fixed_input_size:
        raise PipelineError(f"{where}: takes images of one size only; choose a convolutional network")
    if config.input_size[0] != len(MEAN):
        raise PipelineError(f"{where}: takes images of {config.input_size[0]} channels, not 3; choose another network")
    return config


def _create(timm: ModuleType, settings: schema.Backbone, name: str) -> Any:
    """Build the features of the network, with random weights, without dilation if the settings say so."""
    network = _features(timm, settings, name)
    if not settings.dilated:
        _undilate(network)
    for part, conv in list(network.named_modules()):
        if type(conv) is timm.layers.Conv2dSame:
            network.set_submodule(part, _same(conv))
    return network


def _features(timm: ModuleType, settings: schema.Backbone, name: str) -> Any:
    """Let timm build the features of the network.

    Raises:
        PipelineError: timm does not offer them, or not with this output stride.
    """
    stride = settings.output_stride
    if name.startswith("hrnet"):
        if stride != 4:
            raise PipelineError(f"{settings.name}: output_stride {stride} is not supported; use 4")
        return timm.create_model(name, features_only=True)
    fault = ""
    for options in [{}] if stride == 32 else [{"output_stride": stride}, {}]:
        try:
            network = timm.create_model(name, features_only=True, **options)
        except Exception as error:  # timm raises many types for what it does not support, AssertionError among them
            fault = _short(error)
            continue
        if (last := network.feature_info.reduction()[-1]) == stride:
            return network
        break
    else:
        raise _refusal(settings, f"timm offers no features of it ({fault})")
    _chain(settings, network)
    if last not in typing.get_args(typing.get_type_hints(schema.Backbone)["output_stride"]):
        raise _refusal(settings, f"its stride is {last}, which is no output_stride")
    raise PipelineError(
        f"{settings.name}: output_stride {stride} is not supported by timm; use {last}, or choose a network that timm "
        "can dilate"
    )


def _stages(settings: schema.Backbone, network: Any, config: Any) -> dict[str, Stage]:
    """Regroup the modules of a network by tap.

    A part 'blocks.3' becomes the module 3 of the stage's module 'blocks', so that parameters keep their names.

    Raises:
        PipelineError: the features are not those of one module after the other.
    """
    stages: dict[str, Stage] = {}
    for group in _chain(settings, network):
        parts: dict[str, nn.Module] = {} if stages else {"normalise": Normalise(config.mean, config.std)}
        for name, module in group.items():
            parent, dot, child = name.partition(".")
            if dot:
                parts.setdefault(parent, nn.Sequential()).add_module(child, module)
            else:
                parts[name] = module
        kind = HighResolution if "transition1" in parts else Stage
        stages[f"stage{len(stages) + 1}"] = kind(parts)
    return stages


def _chain(settings: schema.Backbone, network: Any) -> list[dict[str, nn.Module]]:
    """The modules of a network in the order in which they run, grouped by the taps that they lead to."""
    children = dict(network.named_children())
    if "transition1" in children:  # HRNet
        names = ("conv1", "bn1", "act1", "conv2", "bn2", "act2", "layer1", "transition1", "stage2", "transition2",
                 "stage3", "transition3", "stage4")  # fmt: skip
        parts, ends = [(name, children[name]) for name in names], {"act1", "layer1", "stage4"}
    elif hasattr(network, "return_layers"):  # timm's FeatureListNet
        parts, ends = list(network.items()), set(network.return_layers)
    elif "conv_stem" in children and getattr(network, "feature_hooks", True) is None:  # EfficientNet, MobileNetV3
        stem = [(name, children[name]) for name in ("conv_stem", "bn1", "act1") if name in children]
        parts = [*stem, *((f"blocks.{number}", block) for number, block in children["blocks"].named_children())]
        ends = {parts[len(stem) - 1 + stage][0] for stage in network.feature_info.get("stage")}
    else:
        raise _refusal(settings, "its features are not a chain of stages in timm")
    groups: list[dict[str, nn.Module]] = [{}]
    for name, part in parts:
        groups[-1][name] = part
        if name in ends:
            groups.append({})
    return groups[:-1]


@torch.no_grad()
def _measure(settings: schema.Backbone, stages: Mapping[str, Stage]) -> Iterator[tuple[int, int, int]]:
    """Yield each stage's ``stride`` and ``multiple``, and its number of channels.

    Raises:
        PipelineError: a stage takes inputs of one size only, or its output is not B x C x h x w.
    """
    channels = 3
    for stage in stages.values():
        stage.eval()
        fault = ""
        try:
            after = stage(torch.empty(1, channels, PROBE, PROBE)).shape
        except Exception as error:  # timm's assertions, and shapes that do not fit
            raise _refusal(settings, f"does not take images of any size ({_short(error)})") from None
        if len(after) != 4 or after[2] != after[3] or PROBE % after[2]:
            raise _refusal(settings, f"its features are not B x C x h x w ({' x '.join(map(str, after))})")
        stage.stride = PROBE // after[2]
        for multiple in sorted({1, stage.stride, *MULTIPLES}):
            stage.multiple = multiple
            try:
                size = stage(torch.empty(1, channels, *ODD)).shape[2:]
            except Exception as error:
                fault = _short(error)
                continue
            if tuple(size) == tuple(-(-side // stage.stride) for side in ODD):
                break
        else:
            raise _refusal(settings, f"does not take images of any size ({fault})")
        channels = after[1]
        yield stage.stride, stage.multiple, channels


def _undilate(network: nn.Module) -> None:
    """Remove all dilation and the padding that goes with it."""
    for name, conv in list(network.named_modules()):
        if isinstance(conv, nn.Conv2d) and max(conv.dilation) > 1:
            reach = [(size - 1) // 2 for size in conv.kernel_size]
            dilated = zip(conv.padding, conv.dilation, reach, strict=True)
            if not isinstance(conv.padding, str) and all(pad == rate * side for pad, rate, side in dilated):
                conv.padding = tuple(reach)
            conv.dilation = (1, 1)
            if type(conv) is nn.Conv2d and any(size % 2 == 0 for size in conv.kernel_size):  # ConvNeXt's 2x2
                network.set_submodule(name, _same(conv))


def _same(conv: nn.Conv2d) -> nn.Conv2d:
    """Return an equal convolution to timm's with SAME padding; the padding is constant where the stride is 1."""
    if max(conv.stride) > 1 or not all(size % 2 for size in conv.kernel_size):
        return rebuilt(conv, SameConv)
    padding = tuple(rate * (size // 2) for rate, size in zip(conv.dilation, conv.kernel_size, strict=True))
    return rebuilt(conv, nn.Conv2d, padding=padding)


def _layer_types(
    network: nn.Module, is_plain: bool, norm_act: type[nn.Module]
) -> tuple[tuple[type[nn.Module], ...], dict[type[nn.Module], str]]:
    """Return the types of a network's layers, and of each residual block the last submodule of its branch.

    Args:
        is_plain: whether the network has no residual blocks.
        norm_act: timm's batch norm with an activation.
    """
    activations = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, norm_act)
    residuals: dict[type[nn.Module], str] = {}
    if not hasattr(network, "transition1"):  # HRNet uses an activation several times
        for module in network.modules():
            family = type(module).__module__.rpartition(".")[2]
            for branch in BRANCHES.get(f"{family}.{type(module).__name__}", ()):
                if isinstance(getattr(module, branch, None), nn.Module):
                    residuals.setdefault(type(module), branch)
    if residuals or is_plain:
        return (*residuals, *activations), residuals
    return (Stage,), {}


def _short(error: Exception) -> str:
    text = one_line(str(error).split("\n")[0]) or type(error).__name__
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _refusal(settings: schema.Backbone, fault: str) -> PipelineError:
    return PipelineError(f"{settings.name}: {fault}; choose a convolutional network")
