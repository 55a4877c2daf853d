"""What a method is: a classifier whose class-aware maps can be read off."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Classifier
from pipeline.methods.drs import plug


@dataclass(frozen=True, eq=False)
class Output:
    """``logits`` B x K; ``maps`` B x K x h x w, the raw class-aware feature maps F (OAA Sec. 3.1).

    A method whose loss or maps need more than these subclasses it.
    """

    logits: Tensor
    maps: Tensor


class Step(NamedTuple):
    """What a training step computes: the scalar loss, and the output whose maps are accumulated (OAA)."""

    loss: Tensor
    output: Output


class Method(nn.Module, ABC):
    """Base of all methods. A new one is a subclass in a file of its own, which registers it in ``METHODS``.

    ``Settings`` is a frozen dataclass of what a classifier's block may set below ``method.NAME``, ranges beside the
    fields. Its ``faults()`` yields a line for each contradiction among the settings, its ``faults_in(block)`` a line
    for each one with the rest of the block; a line begins with the key at fault.

    Args:
        block: of params.yaml.
        num_classes: K, without background.
    """

    @dataclass(frozen=True)
    class Settings:
        """There are none."""

    settings: Any  # an instance of ``Settings``

    def __init__(self, block: Classifier, num_classes: int) -> None:
        super().__init__()
        self.block = block
        self.settings = block.method.settings
        self.num_classes = num_classes
        self.suppressors = nn.ModuleList()  # of DRS, where ``block.suppression`` asks for it

    @classmethod
    def build(cls, block: Classifier, num_classes: int) -> Self:
        """The method with its initial weights, and with DRS plugged in where ``block.suppression`` asks for it.

        Raises:
            PipelineError: the backbone does not support its settings or weights, or the method has no layer that the
                suppression names.
        """
        method = cls(block, num_classes)
        if block.suppression is not None:
            method.suppressors.extend(plug(method, method.layers(), block.suppression))
        return method

    @property
    @abstractmethod
    def map_name(self) -> str:
        """What the report calls the localization maps; a class attribute will do."""

    @abstractmethod
    def describe(self) -> str:
        """The method and its settings, without the backbone, for the report."""

    def about(self) -> dict[str, str]:
        """What the report shows of this network; the training writes it into its log."""
        parts = [self.describe(), self.block.backbone.describe()]
        if self.block.suppression is not None:
            parts.append(self.block.suppression.describe())
        if self.block.attention_drop is not None:
            parts.append("attention drop layer")
        return {"text": ", ".join(parts), "map_name": self.map_name}

    @property
    def companions(self) -> int:
        """How many images that follow each other in a batch shall have a class in common."""
        return 1

    @abstractmethod
    def new_layers(self) -> Iterable[nn.Module]:
        """The layers added to the backbone."""

    @abstractmethod
    def layers(self) -> dict[str, list[nn.Module]]:
        """By name, shallow to deep, the modules whose outputs are features: those of the backbone's taps, and more."""

    @abstractmethod
    def forward(self, images: Tensor, occluded: Tensor | None = None) -> Output:
        """Classify B x 3 x H x W images; features are zeroed where ``occluded`` (B x 1 x H x W, bool) holds."""

    def training_step(self, images: Tensor, tags: Tensor, epoch: int, occluded: Tensor | None = None) -> Step:
        """The loss of a batch. A method whose loss needs the images, the epoch or several forwards overrides this.

        Args:
            images: B x 3 x H x W, normalised.
            tags: B x K, 0 or 1.
            epoch: counted from 0.
            occluded: B x 1 x H x W, bool: where the attention drop layer zeroes features (``forward``).

        Returns:
            The scalar loss, and the output for ``images`` themselves: its maps are accumulated at their places.
        """
        output = self(images, occluded)
        return Step(self.loss(output, tags), output)

    def loss(self, output: Output, tags: Tensor) -> Tensor:
        """Scalar classification loss against B x K tags."""
        return functional.binary_cross_entropy_with_logits(output.logits.float(), tags)

    def localization(self, output: Output) -> Tensor:
        """B x K x h x w non-negative maps for localization, not normalised, from the output of ``forward``."""
        return output.maps.float().relu()

    def localize(self, images: Tensor) -> Tensor:
        """The localization maps of B x 3 x H x W images, in one pass."""
        return self.localization(self(images))


def occlude(features: Tensor, occluded: Tensor | None) -> Tensor:
    """B x C x h x w features, 0 where at least half of a cell's pixels are ``occluded`` (B x 1 x H x W, bool)."""
    if occluded is None:
        return features
    shares = functional.interpolate(occluded.to(features.dtype), size=features.shape[2:], mode="area")
    return features * (shares < 0.5)
