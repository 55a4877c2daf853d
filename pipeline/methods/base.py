"""The base of all methods: an image classifier with class-aware maps."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Classifier
from pipeline.methods.drs import attach_suppressors


@dataclass(frozen=True, eq=False)
class Output:
    """``logits`` B x K; ``maps`` B x K x h x w, the raw class-aware feature maps F (OAA Sec. 3.1).

    A method whose loss or localization maps need further tensors defines a subclass.
    """

    logits: Tensor
    maps: Tensor


class Step(NamedTuple):
    """The result of a training step: the scalar loss, and the output whose maps OAA accumulates."""

    loss: Tensor
    output: Output


class Method(nn.Module, ABC):
    """Base of all methods. A new method is a subclass in a file of its own, registered there in ``METHODS``.

    ``Settings`` is a frozen dataclass of the keys below ``method.NAME`` in a classifier's block; annotations give their
    ranges. It may define ``faults()``, which yields a line for each contradiction among the settings, and
    ``faults_in(block)``, which yields a line for each contradiction with the rest of the block. A line starts with the
    key at fault.

    Args:
        block: the classifier's block of params.yaml.
        num_classes: K, without background.
    """

    @dataclass(frozen=True)
    class Settings:
        """This method has no settings."""

    settings: Any  # an instance of ``Settings``
    learns_attention = False  # whether the training adds ``attention_loss`` to the loss

    def __init__(self, block: Classifier, num_classes: int) -> None:
        super().__init__()
        self.block = block
        self.settings = block.method.settings
        self.num_classes = num_classes
        self.suppressors = nn.ModuleList()  # DRS suppressors; empty without ``block.suppression``

    @classmethod
    def build(cls, block: Classifier, num_classes: int) -> Self:
        """Build the method with its initial weights, and with DRS suppressors if ``block.suppression`` is set.

        Raises:
            PipelineError: the backbone does not support its settings or weights, or the method lacks a layer that the
                suppression names.
        """
        method = cls(block, num_classes)
        if block.suppression is not None:
            method.suppressors.extend(attach_suppressors(method, method.layers(), block.suppression))
        return method

    @property
    @abstractmethod
    def map_name(self) -> str:
        """Name of the localization maps in the report; subclasses may use a class attribute."""

    @abstractmethod
    def describe(self) -> str:
        """Describe the method and its settings, without the backbone, for the report."""

    def about(self) -> dict[str, str]:
        """The report's description of this network; training writes it to log.json."""
        parts = [self.describe(), self.block.backbone.describe()]
        if self.block.suppression is not None:
            parts.append(self.block.suppression.describe())
        if self.block.attention_drop is not None:
            parts.append("attention drop layer")
        return {"text": ", ".join(parts), "map_name": self.map_name}

    @property
    def is_mean(self) -> bool:
        """Whether the loss of a batch is the mean of its images' losses, so that batches may be merged.

        False unless a method says so. Batch norm, which couples the images of a batch, need not be considered here.
        """
        return False

    @property
    def unit(self) -> int:
        """The number of consecutive images of a batch that one process must compute together."""
        return 1

    @property
    def companions(self) -> int:
        """Size of the groups of consecutive batch images that must share a class; 1 for no grouping."""
        return 1

    @abstractmethod
    def new_layers(self) -> Iterable[nn.Module]:
        """The layers added to the backbone."""

    @abstractmethod
    def layers(self) -> dict[str, list[nn.Module]]:
        """Modules whose outputs are features, by layer name, shallow to deep: the backbone's taps and others."""

    @abstractmethod
    def forward(self, images: Tensor, occluded: Tensor | None = None) -> Output:
        """Classify B x 3 x H x W images; features are zeroed where ``occluded`` (B x 1 x H x W, bool) is true."""

    def training_step(self, images: Tensor, tags: Tensor, epoch: int, occluded: Tensor | None = None) -> Step:
        """Compute the loss of a batch. Override it if the loss needs the images, the epoch or several forward passes.

        Args:
            images: B x 3 x H x W, normalised.
            tags: B x K, 0 or 1.
            epoch: 0-based.
            occluded: B x 1 x H x W, bool; true where the attention drop layer zeroes features (see ``forward``).

        Returns:
            The scalar loss, and the output for ``images``. OAA accumulates its maps, which must align with ``images``.
        """
        output = self(images, occluded)
        return Step(self.loss(output, tags), output)

    def loss(self, output: Output, tags: Tensor) -> Tensor:
        """Scalar classification loss against B x K tags."""
        return functional.binary_cross_entropy_with_logits(output.logits.float(), tags)

    def attention_loss(self, output: Output, attention: Tensor, known: Tensor, tags: Tensor) -> Tensor:
        """Scalar loss of an output of ``training_step`` against the cumulative attention, for methods that learn it.

        Args:
            attention: B x K x h x w cumulative attention in [0, 1] over each sample's window, at the size of
                ``output.maps``; 0 for absent classes and for those without a cumulative map.
            known: B bool on the CPU; whether all tags of a sample have a cumulative map.
            tags: B x K, 0 or 1.

        Returns:
            The mean over the batch; samples that are not ``known`` count as 0.
        """
        raise NotImplementedError

    def localization(self, output: Output) -> Tensor:
        """Localization maps of an output of ``forward``: B x K x h x w, non-negative, not normalised."""
        return output.maps.float().relu()

    def localize(self, images: Tensor) -> Tensor:
        """Localization maps of B x 3 x H x W images, from one forward pass."""
        return self.localization(self(images))


def occlude(features: Tensor, occluded: Tensor | None) -> Tensor:
    """Zero B x C x h x w features where at least half of a cell's pixels are ``occluded`` (B x 1 x H x W, bool)."""
    if occluded is None:
        return features
    shares = functional.interpolate(occluded.to(features.dtype), size=features.shape[2:], mode="area")
    return features * (shares < 0.5)
