"""What a method is: a classifier whose class-aware maps can be read off."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from pipeline.schema import Classifier


@dataclass(frozen=True, eq=False)
class Output:
    """``logits`` B x K; ``maps`` B x K x h x w, the raw class-aware feature maps F (OAA Sec. 3.1).

    A method whose loss or maps need more than these subclasses it.
    """

    logits: Tensor
    maps: Tensor


class Method(nn.Module):
    """Base of all methods. A new one is a subclass in a file of its own and a line in ``METHODS``."""

    def __init__(self, settings: Classifier, num_classes: int) -> None:
        super().__init__()
        self.settings = settings
        self.num_classes = num_classes
        self.suppressors = nn.ModuleList()  # of DRS, where ``settings.suppression`` asks for it

    def new_layers(self) -> Iterable[nn.Module]:
        """The layers added to the backbone."""
        raise NotImplementedError

    def layers(self) -> dict[str, list[nn.Module]]:
        """By name, shallow to deep, the modules whose outputs are features: those of the backbone's taps, and more."""
        raise NotImplementedError

    def forward(self, images: Tensor, occluded: Tensor | None = None) -> Output:
        """Classify B x 3 x H x W images; features are zeroed where ``occluded`` (B x 1 x H x W, bool) holds."""
        raise NotImplementedError

    def loss(self, output: Output, tags: Tensor) -> Tensor:
        """Scalar classification loss against B x K tags."""
        return functional.binary_cross_entropy_with_logits(output.logits.float(), tags)

    def localization(self, output: Output) -> Tensor:
        """B x K x h x w non-negative maps for localization, from what ``forward`` gave; not normalised."""
        return output.maps.float().relu()

    def localize(self, images: Tensor) -> Tensor:
        """The same of images, in one pass."""
        return self.localization(self(images))


def occlude(features: Tensor, occluded: Tensor | None) -> Tensor:
    """B x C x h x w features, 0 where at least half of a cell's pixels are ``occluded`` (B x 1 x H x W, bool)."""
    if occluded is None:
        return features
    shares = functional.interpolate(occluded.to(features.dtype), size=features.shape[2:], mode="area")
    return features * (shares < 0.5)
