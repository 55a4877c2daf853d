"""What every backbone is: named stages in a row, each of which can be tapped."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError

_T = TypeVar("_T")


class Tap(NamedTuple):
    """A place where features can be read: their channels, and the input pixels one feature pixel spans."""

    channels: int
    stride: int


class Published(NamedTuple):
    """Where torchvision keeps a network's ImageNet weights, and the prefix of its names for the backbone's parts."""

    enum: str
    prefix: str


class Backbone(nn.Module):
    """A feature extractor: B x 3 x H x W to B x C x ceil(H / stride) x ceil(W / stride).

    Args:
        stages: one module a tap, shallow to deep.
        taps: by the name of the stage; the last one is the output.
        frozen_batch_norm: keep the statistics and affine parameters of all batch norms.
        layer_types: of the modules whose output is that of a layer: activations of a plain network, blocks of a
            residual one.
        residuals: for each type of residual block, the name of the module in it whose output is added to the shortcut.
        published: its ImageNet weights; None where torchvision has none.
        ends_before_pool: whether a pooling follows the last stage in the published network (VGG-16's pool5).
    """

    def __init__(
        self,
        stages: Mapping[str, nn.Module],
        taps: Mapping[str, Tap],
        frozen_batch_norm: bool,
        layer_types: tuple[type[nn.Module], ...],
        residuals: Mapping[type[nn.Module], str] | None = None,
        published: Published | None = None,
        ends_before_pool: bool = False,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(stages)
        self.taps = dict(taps)
        self.frozen_batch_norm = frozen_batch_norm
        self.layer_types = layer_types
        self.residuals = dict(residuals or {})
        self.published = published
        self.ends_before_pool = ends_before_pool
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
        """Keep the first stages as they are: their weights, and their norms' affine parameters and statistics.

        Raises:
            PipelineError: ``names`` are not the first taps; below a stage that learns, freezing another saves nothing.
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
        """The features of the last tap."""
        for stage in self.stages.values():
            x = stage(x)
        return x

    def features(self, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """The features of the named taps; stages deeper than the deepest of them are not computed.

        Raises:
            ValueError: a name is no tap of this backbone.
        """
        if unknown := [name for name in names if name not in self.taps]:
            raise ValueError(f"no tap {', '.join(unknown)}; the taps are {', '.join(self.taps)}")
        found: dict[str, Tensor] = {}
        for name, stage in self.stages.items():
            if len(found) == len(set(names)):
                break
            x = stage(x)
            if name in names:
                found[name] = x
        return {name: found[name] for name in names}

    def layers(self) -> dict[str, list[nn.Module]]:
        """By tap, the modules whose outputs are the features of its layers, shallow to deep."""
        return {name: list(outermost(stage, self.layer_types)) for name, stage in self.stages.items()}

    def increments(self) -> dict[str, list[nn.Module]]:
        """By tap, shallow to deep, the modules whose outputs are what each layer contributes.

        In a residual network that is what each block adds to its shortcut, after the last norm that there is, and
        nothing outside of blocks; in a plain one, the layers' outputs themselves.
        """
        layers, inner = self.layers(), self.residuals
        if not inner:
            return layers
        return {
            name: [block.get_submodule(inner[type(block)]) for block in found if type(block) in inner]
            for name, found in layers.items()
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
    """The modules of these kinds within, but for those inside of one another."""
    if isinstance(module, kinds):
        yield module
    else:
        for child in module.children():
            yield from outermost(child, kinds)


def observe(network: nn.Module, modules: Sequence[nn.Module], inputs: Tensor, look: Callable[[Tensor], _T]) -> list[_T]:
    """What ``look`` makes of each module's output, as hooks leave it, while ``inputs`` go through ``network``."""
    found: dict[nn.Module, _T] = {}
    handles = [
        module.register_forward_hook(lambda module, _inputs, output: found.update({module: look(output)}))
        for module in modules
    ]
    try:
        network(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [found[module] for module in modules]


@torch.no_grad()
def output_channels(network: nn.Module, modules: Sequence[nn.Module]) -> list[int]:
    """The channels of each module's output, seen on a small blank image that goes through ``network``."""
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
    """Let what ``make`` makes of its channels change the output of each module of the layers.

    The new modules hook onto the old ones, whose names in a state dict stay what they were.

    Args:
        names: of the layers; None: all of them.
        key: what ``names`` is called in params.yaml.

    Raises:
        PipelineError: a name is none of ``layers``.
    """
    chosen = tuple(layers) if names is None else names
    if unknown := [name for name in chosen if name not in layers]:
        raise PipelineError(f"{key}: no layer {', '.join(unknown)}; the layers are {', '.join(layers)}")
    modules = [module for name in chosen for module in layers[name]]
    made = [make(channels) for channels in output_channels(network, modules)]
    for module, change in zip(modules, made, strict=True):
        module.register_forward_hook(lambda _module, _inputs, output, change=change: change(output))
    return made


def limit_stride(blocks: Iterable[nn.Module], stride: int, output_stride: int, dilated: bool) -> list[int]:
    """Take the stride from the blocks that would exceed ``output_stride``, and dilate what follows in its place.

    A block that loses its stride keeps the dilation of those before it, and the next ones double it, so that every
    convolution but the first sees the pixels it was trained on (as torchvision's ``replace_stride_with_dilation``).

    Args:
        blocks: shallow to deep; at most one spatial convolution of each is strided.
        stride: of the features that enter the first block.

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
    """Initialise the convolutions within for ReLU: He et al.'s normal over the fan-out, biases 0."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
