"""Maps of the highest classes of images, for boxes of objects in images that a classifier was not trained on."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.config.views import Views
from pipeline.data.index import Image
from pipeline.data.loading import resized
from pipeline.evaluation.boxes import HIGHEST
from pipeline.inference.batching import batches, pixels_per_batch
from pipeline.inference.localize import fuse_views, view_maps
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
        for sample, image in enumerate(part):
            classes = [*highest[sample], *(tag - 1 for tag in image.tags if tag - 1 not in highest[sample])]
            grid = -(-image.height // settings.stride), -(-image.width // settings.stride)
            values = fuse_views([view[sample, classes] for view in maps], grid, settings)
            check_outputs(values[None], [image])
            values = values / values.amax((1, 2), keepdim=True).clamp_min(1e-5)
            levels = (values * 255).round().to(torch.uint8).cpu().numpy()
            for class_index, level in zip(classes, levels, strict=True):
                yield image.id, class_index + 1, np.ascontiguousarray(level)
