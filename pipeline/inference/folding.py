"""A form of trained networks that computes faster in bf16: batch norms are folded into the convolutions before them.

In evaluation mode a batch norm scales and shifts each channel. A convolution with other weights does both at once.
Outputs differ by rounding, of which bf16 has much anyway. In fp32, networks stay as they are, and so do results.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pipeline.training.settings import uses_bf16

PROBE = 64  # side in pixels of the image with which a network is traced


def placed(network: nn.Module, device: torch.device, precision: str) -> nn.Module:
    """Move a network to the device where it will compute, folded if it computes in bf16 there.

    Args:
        network: on the CPU, in evaluation mode. It is changed.
        precision: 'auto', 'bf16' or 'fp32'.
    """
    if uses_bf16(device, precision):
        fold(network)
    return network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def fold(network: nn.Module) -> nn.Module:
    """Fold batch norms into convolutions, and store the weights of convolutions in bf16.

    A forward pass shows which batch norm reads which convolution. They are folded if the batch norm is the only reader;
    modules with hooks stay as they are. Weights are stored in bf16 where autocast would otherwise convert them in every
    forward pass.

    Args:
        network: on the CPU, in evaluation mode. It is changed, and must compute under bf16 autocast from then on.

    Returns:
        The network.
    """
    trace = _Trace(network)
    blank = torch.zeros(1, 3, PROBE, PROBE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), trace:
        network(blank)
        if (localize := getattr(network, "localize", None)) is not None:
            localize(blank)
    for conv, norm in trace.pairs():
        _fold(conv, norm)
    for conv in trace.converted():
        conv.to(torch.bfloat16)
    return network


class _Trace(TorchFunctionMode):
    """Records calls of convolutions and batch norms, and which operations read a convolution's output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        modules = list(network.modules())
        self._convs = {id(conv.weight): conv for conv in modules if isinstance(conv, nn.Conv2d)}
        self._norms = {id(norm.running_mean): norm for norm in modules if isinstance(norm, nn.BatchNorm2d)}
        self._outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # by id; the tensor is kept, so that its id stays taken
        self._readers: dict[int, list[nn.BatchNorm2d | None]] = {}  # of each output; None: another operation
        self._sources: dict[nn.BatchNorm2d, set[nn.Conv2d | None]] = {}  # None: not a convolution
        self._under_autocast: dict[nn.Conv2d, list[bool]] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: tuple[Any, ...] = (), named: Any = None
    ) -> Any:
        named = named or {}
        result = function(*arguments, **named)
        module = id(arguments[1]) if len(arguments) > 1 else 0  # weight or running mean
        norm = self._norms.get(module) if function is functional.batch_norm else None
        if norm is not None:
            conv, _ = self._outputs.get(id(arguments[0]), (None, None))
            self._sources.setdefault(norm, set()).add(conv)
        if any(isinstance(value, Tensor) for value in pytree.tree_leaves(result)):  # others read the shape or the like
            for value in pytree.tree_leaves((arguments, named)):
                if id(value) in self._outputs:
                    self._readers[id(value)].append(norm)
        if function is torch.conv2d and module in self._convs:
            conv = self._convs[module]
            self._outputs[id(result)] = conv, result
            self._readers[id(result)] = []
            self._under_autocast.setdefault(conv, []).append(torch.is_autocast_enabled(result.device.type))
        return result

    def pairs(self) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """Yield the convolutions whose outputs are always read by one batch norm alone, which reads nothing else."""
        readers: dict[nn.Conv2d, set[tuple[nn.BatchNorm2d | None, ...]]] = {}
        for key, (conv, _) in self._outputs.items():
            readers.setdefault(conv, set()).add(tuple(self._readers[key]))
        for conv, found in readers.items():
            norm = next(iter(found))[0] if found == {next(iter(found))[:1]} else None
            if norm is not None and self._sources[norm] == {conv} and _is_foldable(norm):
                yield conv, norm

    def converted(self) -> list[nn.Conv2d]:
        """Return the convolutions whose weights autocast converts in every call; other types may switch it off."""
        return [conv for conv, enabled in self._under_autocast.items() if all(enabled) and type(conv) is nn.Conv2d]


def _is_foldable(norm: nn.BatchNorm2d) -> bool:
    """Whether nothing follows the normalisation, or only ``drop`` and ``act`` of timm's ``BatchNormAct2d``."""
    has_known_end = type(norm) is nn.BatchNorm2d or [name for name, _ in norm.named_children()] == ["drop", "act"]
    return has_known_end and not (norm.training or norm._forward_hooks or norm._forward_pre_hooks)


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Give ``conv`` the weights of both; ``norm`` keeps only what follows its normalisation."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        scale *= norm.weight.detach()
    before = 0.0 if conv.bias is None else conv.bias.detach().double()
    shift = (before - norm.running_mean) * scale
    if norm.affine:
        shift += norm.bias.detach()
    weight = conv.weight.detach().double() * scale[:, None, None, None]
    conv.weight, conv.bias = (nn.Parameter(values.to(conv.weight), requires_grad=False) for values in (weight, shift))
    norm.forward = nn.Sequential(*norm.children()).forward  # type: ignore[method-assign]
