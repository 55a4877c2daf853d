"""The base of all backbones: a sequence of named stages whose features can be read, and hooks on their layers."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.networks.published import PublishedWeights

_T = TypeVar("_T")


class Tap(NamedTuple):
    """A point at which features can be read: their channels, and their stride in input pixels."""

    channels: int
    stride: int


class Backbone(nn.Module):
    """A feature extractor: B x 3 x H x W images to B x C x ceil(H / stride) x ceil(W / stride) features.

    Args:
        stages: one module per tap, shallow to deep.
        taps: taps by stage name; the last one is the output.
        frozen_batch_norm: freeze the statistics and affine parameters of all batch norms.
        layer_types: types of the modules whose outputs count as layer outputs: the activations of a plain network, and
            the blocks of a residual network.
        residuals: for each type of residual block, the name of its submodule whose output is added to the shortcut.
        published: ImageNet weights; None if no library has them.
        ends_before_pool: whether the published network has a pooling layer after the last stage (VGG-16's pool5).
        constants: names of buffers that published weights lack, such as those of the normalisation.
    """

    def __init__(
        self,
        stages: Mapping[str, nn.Module],
        taps: Mapping[str, Tap],
        frozen_batch_norm: bool,
        layer_types: tuple[type[nn.Module], ...],
        residuals: Mapping[type[nn.Module], str] | None = None,
        published: PublishedWeights | None = None,
        ends_before_pool: bool = False,
        constants: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(stages)
        self.taps = dict(taps)
        self.frozen_batch_norm = frozen_batch_norm
        self.layer_types = layer_types
        self.residuals = dict(residuals or {})
        self.published = published
        self.ends_before_pool = ends_before_pool
        self.constants = constants
        self.frozen: tuple[str, ...] = ()
        if frozen_batch_norm:
            for norm in self._batch_norms():
                norm.requires_grad_(False)
            self.train()

    @property
    def out_channels(self) -> int:
        return self._output.channels

    @property
    def out_stride(self) -> int:
        return self._output.stride

    @property
    def _output(self) -> Tap:
        return list(self.taps.values())[-1]

    def freeze(self, names: Sequence[str]) -> None:
        """Freeze the first stages: their weights, and the affine parameters and statistics of their batch norms.

        Raises:
            PipelineError: ``names`` are not the first taps. Freezing a stage above a trainable one would save no work.
        """
        if list(names) != list(self.taps)[: len(names)]:
            raise PipelineError(
                f"backbone.frozen: {', '.join(names)} must be the first of the taps {', '.join(self.taps)}"
            )
        self.frozen = tuple(names)
        for name in names:
            self.stages[name].requires_grad_(False)
        self.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features of the last tap."""
        for stage in self.stages.values():
            x = stage(x)
        return x

    def features(self, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Compute the features of the named taps; stages after the deepest of them are skipped.

        Raises:
            ValueError: the backbone has no tap of that name.
        """
        if unknown := [name for name in names if name not in self.taps]:
            raise ValueError(f"no tap {', '.join(unknown)}; the taps are {', '.join(self.taps)}")
        features: dict[str, Tensor] = {}
        for name, stage in self.stages.items():
            if len(features) == len(set(names)):
                break
            x = stage(x)
            if name in names:
                features[name] = x
        return {name: features[name] for name in names}

    def layers(self) -> dict[str, list[nn.Module]]:
        """The modules whose outputs are layer outputs, by tap, shallow to deep; the stage itself if it has none."""
        return {name: list(outermost(stage, self.layer_types)) or [stage] for name, stage in self.stages.items()}

    def increments(self) -> dict[str, list[nn.Module]]:
        """The modules whose outputs are the layers' increments, by tap, shallow to deep.

        The increment of a residual block is its residual branch, just before the addition to the shortcut. Layers
        outside residual blocks have none. In a plain network the increments are the layer outputs themselves.
        """
        layers, residuals = self.layers(), self.residuals
        if not residuals:
            return layers
        return {
            name: [block.get_submodule(residuals[type(block)]) for block in modules if type(block) in residuals]
            for name, modules in layers.items()
        }

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen_batch_norm:
            for norm in self._batch_norms():
                norm.eval()
        for name, stage in self.stages.items():
            if name in self.frozen:
                stage.eval()
        return self

    def _batch_norms(self) -> Iterable[nn.BatchNorm2d]:
        return (module for module in self.modules() if isinstance(module, nn.BatchNorm2d))


def outermost(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    """Submodules of the types ``kinds``, except those nested inside another one."""
    if isinstance(module, kinds):
        yield module
    else:
        for child in module.children():
            yield from outermost(child, kinds)


def observe(
    network: nn.Module, modules: Sequence[nn.Module], inputs: Tensor, reduce: Callable[[Tensor], _T]
) -> list[_T]:
    """Run ``network`` on ``inputs`` and return ``reduce(output)`` for each of ``modules``.

    Earlier forward hooks have already been applied to the outputs.
    """
    results: dict[nn.Module, _T] = {}
    handles = [
        module.register_forward_hook(lambda module, _inputs, output: results.update({module: reduce(output)}))
        for module in modules
    ]
    try:
        network(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [results[module] for module in modules]


@torch.no_grad()
def output_channels(network: nn.Module, modules: Sequence[nn.Module]) -> list[int]:
    """Number of output channels of each module, from a forward pass of ``network`` on a small blank image."""
    blank = torch.zeros(1, 3, 64, 64, device=next(network.parameters()).device)
    training = network.training
    channels = observe(network.eval(), modules, blank, lambda output: output.shape[1])
    network.train(training)
    return channels


def attach(
    network: nn.Module,
    layers: Mapping[str, Sequence[nn.Module]],
    names: Sequence[str] | None,
    key: str,
    make: Callable[[int], nn.Module],
) -> list[nn.Module]:
    """Apply a new module to the output of every module of the named layers.

    The new modules are attached by forward hooks, so state-dict names of the network do not change.

    Args:
        names: names of the layers, or slices of all of them such as '-2:', the last two; None selects all.
        key: the params.yaml key of ``names``, for the error message.
        make: builds the new module for a number of channels.

    Returns:
        The new modules, shallow to deep.

    Raises:
        PipelineError: a name is not in ``layers``.
    """
    chosen = tuple(layers) if names is None else tuple(each for name in names for each in _sliced(tuple(layers), name))
    if unknown := [name for name in chosen if name not in layers]:
        raise PipelineError(f"{key}: no layer {', '.join(unknown)}; the layers are {', '.join(layers)}")
    modules = [module for name in chosen for module in layers[name]]
    attached = [make(channels) for channels in output_channels(network, modules)]
    for module, new in zip(modules, attached, strict=True):
        module.register_forward_hook(lambda _module, _inputs, output, new=new: new(output))
    return attached


def _sliced(layers: Sequence[str], name: str) -> Sequence[str]:
    """Return the layers that a slice such as '-2:' or ':-1' selects; any other name stands for itself."""
    if not (match := re.fullmatch(r"(-?\d*):(-?\d*)", name)):
        return (name,)
    first, last = (int(text) if text.strip("-") else None for text in match.groups())
    return layers[first:last]


def limit_stride(blocks: Iterable[nn.Module], stride: int, output_stride: int, dilated: bool) -> list[int]:
    """Remove the stride of the blocks that would exceed ``output_stride``, and dilate the blocks after them instead.

    A block that loses its stride keeps the dilation of the blocks before it, and the blocks after it double the
    dilation. All convolutions but the first then keep the sampling pattern that they were trained with, as with
    torchvision's ``replace_stride_with_dilation``.

    Args:
        blocks: shallow to deep; each has at most one strided spatial convolution.
        stride: stride of the features that enter the first block.
        output_stride: the largest allowed stride.
        dilated: whether to dilate; if false, only strides change.

    Returns:
        The stride after each block.
    """
    dilation = 1
    strides = []
    for block in blocks:
        convs = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
        step = max(conv.stride[0] for conv in convs)
        exceeds = stride * step > output_stride
        for conv in convs:
            if exceeds:
                conv.stride = (1, 1)
            if dilated and conv.kernel_size[0] > 1:
                conv.dilation = (dilation, dilation)
                conv.padding = (dilation * (conv.kernel_size[0] // 2),) * 2
        if exceeds:
            dilation *= step
        else:
            stride *= step
        strides.append(stride)
    return strides


def he_normal(module: nn.Module) -> None:
    """Initialise all convolutions in ``module`` for ReLU: He et al.'s normal (fan-out), zero biases."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
