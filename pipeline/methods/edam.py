"""The embedded discriminative attention mechanism (EDAM): masks are learned in the classifier itself."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline import schema
from pipeline.methods.base import Method, Output, occlude
from pipeline.methods.collaboration import CollaborativeAttention
from pipeline.networks.backbones import build_backbone
from pipeline.schema import Classifier


class Edam(Method):
    """Backbone, discriminative activation layer, collaborative multi-attention, a linear classifier for each class.

    The masks are the maps, in [0, 1]: each place's scores of the K classes and of the background (last, and used for
    nothing else) over their Euclidean norm, without their sign (EDAM Eq. 1). The backbone's features, reduced to
    ``edam.channels``, times a class's mask are its activation map (Eq. 2; the reduction is linear, so that it may come
    first, as in the public code).

    The attention is of the training alone, as in the paper: in evaluation mode the same classifiers judge the plain
    mean of the activation maps, so that an image's answer does not hang on its neighbours in the batch.
    """

    def __init__(self, settings: Classifier, num_classes: int) -> None:
        super().__init__(settings, num_classes)
        edam = settings.edam or schema.Edam()
        self.backbone = build_backbone(settings.backbone)
        channels = self.backbone.out_channels
        self.activation = nn.Conv2d(channels, num_classes + 1, 3, padding=1, bias=False)
        self.reduction = nn.Conv2d(channels, edam.channels, 1, bias=False)
        self.classifier = nn.Conv1d(num_classes * edam.channels, num_classes, 1, groups=num_classes, bias=False)
        nn.init.xavier_uniform_(self.activation.weight)
        nn.init.xavier_uniform_(self.reduction.weight)
        reach = math.sqrt(6 / (edam.channels + 1))  # Xavier's, of one class's layer
        nn.init.uniform_(self.classifier.weight, -reach, reach)
        self.collaboration = CollaborativeAttention(num_classes, edam) if edam.collaborative else None

    def new_layers(self) -> Iterable[nn.Module]:
        """The convolutions; the attention learns at the backbone's rate."""
        return [self.activation, self.reduction, self.classifier, self.suppressors]

    def layers(self) -> dict[str, list[nn.Module]]:
        """The backbone's."""
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
        """The masks, without what comes after them."""
        return self._masks(self.backbone(images))

    def _masks(self, features: Tensor) -> Tensor:
        """B x K x h x w float32. Where all scores are 0 (an occluded place), the masks are, and so is the gradient."""
        scores = self.activation(features).float()
        return functional.normalize(scores, dim=1)[:, : self.num_classes].abs()


def companions(settings: Classifier) -> int:
    """Of the images that lie together in a batch, how many shall share a class: those of EDAM's groups, else 1."""
    edam = settings.edam or schema.Edam()
    paired = settings.method == "edam" and edam.collaborative and edam.pairing == "shared_class"
    return edam.group if paired else 1
