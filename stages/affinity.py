"""Train the affinity network on confident labels."""

import json
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pipeline.data.index import Index
from pipeline.data.loading import Batch, TrainingSet
from pipeline.inference import models
from pipeline.refinement.affinity import AffinityNetwork, affinity_loss
from pipeline.schema import Affinity
from pipeline.stage import Work, run
from pipeline.stores.raster import RasterStore
from pipeline.training.loop import Loop, Stateless
from pipeline.training.segmentation import reduced
from pipeline.training.settings import prepare


class AffinityTask(Stateless):
    """An affinity network and the label maps of a batch, each cell with the label under its centre."""

    def __init__(self, network: AffinityNetwork, radius: int) -> None:
        self.network = network
        self.radius = radius

    def new_layers(self) -> Iterable[nn.Module]:
        return self.network.new_layers()

    def loss(self, batch: Batch, epoch: int) -> Tensor:
        assert batch.labels is not None
        logits = self.network(batch.images)
        return affinity_loss(logits, reduced(batch.labels, logits.shape[2:]), self.radius)


def main(work: Work) -> None:
    settings: Affinity = work.job.block
    seed, runtime = work.job.params["seed"], work.runtime
    device = prepare(runtime.device, runtime.threads)
    index = Index(work.inputs["index"])
    labels = RasterStore(work.inputs["labels"])
    dataset = TrainingSet(index.images("train"), index.num_classes, settings.augmentation, seed, labels)
    torch.manual_seed(seed)
    network = models.build(settings, index.num_classes)
    assert isinstance(network, AffinityNetwork)
    task = AffinityTask(network, settings.radius)
    loop = Loop(task, dataset, settings.training, device, runtime=runtime, path=work.checkpoint, label=work.job.label)
    log = loop.run()
    models.save(work.outputs["model"], network, settings, index.num_classes)
    work.outputs["log"].write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    run("affinity", main)
