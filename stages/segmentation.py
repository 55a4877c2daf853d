"""Train a segmentation network on label maps: pseudo labels, or masks for the supervised upper bound."""

import json
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pipeline.data.index import Index
from pipeline.data.loading import Batch, TrainingSet
from pipeline.inference import models
from pipeline.networks.deeplab import SegmentationNetwork
from pipeline.schema import Segmentation
from pipeline.stage import Work, run
from pipeline.stores.raster import RasterStore
from pipeline.training.loop import Loop, Stateless
from pipeline.training.segmentation import segmentation_loss
from pipeline.training.settings import prepare


class SegmentationTask(Stateless):
    """A segmentation network and the label maps of a batch."""

    def __init__(self, network: SegmentationNetwork, settings: Segmentation) -> None:
        self.network = network
        self.settings = settings

    def new_layers(self) -> Iterable[nn.Module]:
        return [self.network.head]

    def loss(self, batch: Batch, epoch: int) -> Tensor:
        assert batch.labels is not None
        supervised = self.network.supervised(batch.images)
        settings = self.settings
        return segmentation_loss(supervised, batch.labels, batch.tags, settings.loss_size, settings.self_training)


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
    task = SegmentationTask(network, settings)
    loop = Loop(task, dataset, settings.training, device, runtime=runtime, path=work.checkpoint, label=work.job.label)
    log = loop.run()
    models.save(work.outputs["model"], network, settings, index.num_classes)
    work.outputs["log"].write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    run("segmentation", main)
