"""The embedded discriminative attention mechanism (EDAM): the classifier learns masks itself."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.reader import Count, Range
from pipeline.config.registry import METHODS
from pipeline.config.schema import Classifier
from pipeline.methods.base import Method, Output, occlude
from pipeline.methods.collaboration import CollaborativeAttention
from pipeline.networks.backbones import build_backbone


@METHODS.register("edam")
class Edam(Method):
    """Backbone, discriminative activation layer, collaborative multi-attention, a linear classifier for each class.

    The maps are the masks, in [0, 1]: the absolute scores of the K classes and the background at each position, divided
    by their Euclidean norm (EDAM Eq. 1). The background score is last and serves only this normalisation. The
    activation map of a class is the product of its mask and the backbone's features, reduced to ``settings.channels``
    (Eq. 2). The reduction is linear, so it may come first, as in the public code.

    Attention is used only in training, as in the paper. In evaluation mode the same classifiers are applied to the
    plain mean of the activation maps, so an image's result does not depend on the other images of the batch.
    """

    map_name = "Activation mask"

    @dataclass(frozen=True)
    class Settings:
        """Settings of the discriminative activation layer and the collaborative multi-attention module.

        These replace the classifier's ``head``. ``training.batch_size`` must be a multiple of ``group``.
        """

        channels: Count = 128  # of the class-specific activation maps and of the attention
        heads: Count = 2
        hidden: Count = 512  # of the feed-forward layer
        dropout: Annotated[float, Range(least=0, below=1)] = 0.1
        collaborative: bool = True  # use collaborative multi-attention; false: plain pooling (Table 5)
        group: Annotated[int, Range(least=1, most=4)] = 2  # images that attend to each other (Table 6)
        pairing: Literal["shared_class", "random"] = "shared_class"  # how groups are formed
        # Localization maps: the masks (the paper), or the absolute scores before their normalisation over the classes
        maps: Literal["masks", "scores"] = "masks"

        def faults(self) -> Iterator[str]:
            if self.channels % self.heads:
                yield f"channels: {self.channels} is not a multiple of heads, {self.heads}"

        def faults_in(self, block: Classifier) -> Iterator[str]:
            size, processes = block.training.batch_size, block.training.processes
            if size % self.group:
                yield f"training.batch_size: {size} is not a multiple of method.edam.group, {self.group}"
            elif size % processes == 0 and size // processes % self.group and self.collaborative:
                yield (
                    f"training.processes: {size // processes} images for each of {processes} processes would split "
                    f"a group of method.edam.group, {self.group}; batch_size must be a multiple of "
                    f"{processes * self.group}"
                )

    settings: Settings

    def __init__(self, block: Classifier, num_classes: int) -> None:
        super().__init__(block, num_classes)
        edam = self.settings
        self.backbone = build_backbone(block.backbone)
        channels = self.backbone.out_channels
        self.activation = nn.Conv2d(channels, num_classes + 1, 3, padding=1, bias=False)
        self.reduction = nn.Conv2d(channels, edam.channels, 1, bias=False)
        self.classifier = nn.Conv1d(num_classes * edam.channels, num_classes, 1, groups=num_classes, bias=False)
        nn.init.xavier_uniform_(self.activation.weight)
        nn.init.xavier_uniform_(self.reduction.weight)
        bound = math.sqrt(6 / (edam.channels + 1))  # Xavier's, for the layer of one class
        nn.init.uniform_(self.classifier.weight, -bound, bound)
        self.collaboration = CollaborativeAttention(num_classes, edam) if edam.collaborative else None

    def describe(self) -> str:
        """Such as 'EDAM, collaborative attention over 2 images that share a class'."""
        settings = self.settings
        maps = ", maps of scores" if settings.maps == "scores" else ""
        if not settings.collaborative:
            return f"EDAM without collaborative attention{maps}"
        pairing = {"shared_class": "that share a class", "random": "drawn at random"}[settings.pairing]
        images = f"{settings.group} images {pairing}" if settings.group > 1 else "single images"
        return f"EDAM, collaborative attention over {images}{maps}"

    @property
    def unit(self) -> int:
        """The group size with attention, which needs the whole group; 1 without."""
        return self.settings.group if self.settings.collaborative else 1

    @property
    def companions(self) -> int:
        """The group size if a group's images share a class; 1 for random groups or without attention."""
        settings = self.settings
        return settings.group if settings.collaborative and settings.pairing == "shared_class" else 1

    def new_layers(self) -> Iterable[nn.Module]:
        """The convolutions; the attention is trained at the backbone's rate."""
        return [self.activation, self.reduction, self.classifier, self.suppressors]

    def layers(self) -> dict[str, list[nn.Module]]:
        """The backbone's layers."""
        return self.backbone.layers()

    def forward(self, images: Tensor, occluded: Tensor | None = None) -> Output:
        features = occlude(self.backbone(images), occluded)
        masks, reduced = self._masks(features), self.reduction(features)
        if self.training and self.collaboration is not None:
            pooled = self.collaboration(reduced, masks)
        else:
            pooled = torch.einsum("bkhw,bchw->bkc", masks.to(reduced.dtype), reduced) / features[0, 0].numel()
        logits = self.classifier(pooled.flatten(1)[..., None])[..., 0]
        return Output(logits.float(), masks)

    def localize(self, images: Tensor) -> Tensor:
        """The masks, or with ``maps: scores`` the absolute scores; the rest of the network is not evaluated.

        A mask compares the classes at a position and is near 1 wherever one class prevails, also where all scores are
        small. The scores themselves are larger on objects than beside them, if the backbone is pretrained.
        """
        features = self.backbone(images)
        if self.settings.maps == "scores":
            return self._scores(features)[:, : self.num_classes].abs()
        return self._masks(features)

    def _masks(self, features: Tensor) -> Tensor:
        """The masks, B x K x h x w float32; masks and gradients are 0 where all scores are 0 (occluded positions)."""
        return functional.normalize(self._scores(features), dim=1)[:, : self.num_classes].abs()

    def _scores(self, features: Tensor) -> Tensor:
        """The scores of the K classes and the background, B x K+1 x h x w float32."""
        return cast(Tensor, self.activation(features)).float()
