"""Train a segmentation network on label maps: pseudo labels, or masks for the supervised upper bound."""

import json
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.data.index import Index
from pipeline.data.loading import IGNORE, Batch, TrainingSet
from pipeline.inference import models
from pipeline.networks.deeplab import SegmentationNetwork
from pipeline.schema import Segmentation
from pipeline.stage import Work, run
from pipeline.stores.raster import RasterStore
from pipeline.training.loop import Loop, Stateless
from pipeline.training.settings import prepare


class SegmentationTask(Stateless):
    """Cross entropy of the upsampled logits against label maps; 255 is ignored."""

    def __init__(self, network: SegmentationNetwork) -> None:
        self.network = network

    def new_layers(self) -> Iterable[nn.Module]:
        return [self.network.head]

    def loss(self, batch: Batch, epoch: int) -> Tensor:
        assert batch.labels is not None
        logits = self.network(batch.images).float()
        logits = functional.interpolate(logits, size=batch.labels.shape[1:], mode="bilinear", align_corners=False)
        # As rows, since the kernel for images is not deterministic on CUDA.
        rows, labels = logits.movedim(1, -1).flatten(0, -2), batch.labels.flatten()
        total = functional.cross_entropy(rows, labels, ignore_index=IGNORE, reduction="sum")
        return total / (batch.labels != IGNORE).sum().clamp_min(1)  # a batch without a label gives 0, not NaN


def main(work: Work) -> None:
    settings: Segmentation = work.job.block
    seed, runtime = work.job.params["seed"], work.runtime
    device = prepare(runtime.device, runtime.threads)
    index = Index(work.inputs["index"])
    labels = RasterStore(work.inputs["labels"])
    dataset = TrainingSet(index.images("train"), index.num_classes, settings.augmentation, seed, labels)
    torch.manual_seed(seed)
    network = models.build(settings, index.num_classes)
    assert isinstance(network, SegmentationNetwork)
    task = SegmentationTask(network)
    loop = Loop(task, dataset, settings.training, device, runtime=runtime, path=work.checkpoint, label=work.job.label)
    log = loop.run()
    models.save(work.outputs["model"], network, settings, index.num_classes)
    work.outputs["log"].write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    run("segmentation", main)
