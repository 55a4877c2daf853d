"""Maps of the highest classes of images, for boxes of objects in images that a classifier was not trained on."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.config.views import Views
from pipeline.data.index import Image
from pipeline.data.loading import resized
from pipeline.evaluation.boxes import HIGHEST
from pipeline.inference.batching import batches, pixels_per_batch
from pipeline.inference.localize import fused_rows, view_maps
from pipeline.methods.base import Method
from pipeline.networks.finite import check_outputs
from pipeline.stores.blocks import Row
from pipeline.training.settings import autocast


def class_maps(
    network: Method, images: Sequence[Image], settings: Views, device: torch.device, precision: str = "auto"
) -> Iterator[Row]:
    """Yield maps of the ``HIGHEST`` classes of each image, the highest score first, then those of its other tags.

    Scores are logits averaged over scales and flips. Maps are fused and stored as by ``localization_maps``.
    """

    def shape(image: Image) -> tuple[int, int]:
        return resized(image.height, image.width, settings.side, settings.length)

    for part, inputs in batches(images, shape, pixels_per_batch(device)):
        logits: list[Tensor] = []

        @torch.inference_mode()
        def localize(batch: Tensor, logits: list[Tensor] = logits) -> Tensor:
            with autocast(batch.device, precision):
                output = network(batch)
            logits.append(output.logits.float())
            return network.localization(output).float()

        maps = view_maps(localize, inputs.to(device), settings)
        scores = torch.stack(logits).mean(0)
        check_outputs(scores, part)
        highest = scores.topk(min(HIGHEST, network.num_classes)).indices.tolist()
        others = [[tag - 1 for tag in image.tags] for image in part]
        classes = [[*first, *(k for k in rest if k not in first)] for first, rest in zip(highest, others, strict=True)]
        yield from fused_rows(maps, part, classes, settings, normalise=True)
