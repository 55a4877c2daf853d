"""Train the affinity network on confident labels."""

from collections.abc import Iterable

from torch import Tensor, nn

from pipeline.config.schema import Affinity
from pipeline.data.loading import Batch
from pipeline.refinement.affinity import AffinityNetwork, affinity_loss
from pipeline.stores.raster import RasterStore
from pipeline.training.loop import Stateless
from pipeline.training.segmentation import reduced
from pipeline.workflow.fit import fit
from pipeline.workflow.stage import Work, run


class AffinityTask(Stateless):
    """The training task of an affinity network. Each cell has the label of the pixel at its centre."""

    def __init__(self, network: AffinityNetwork, settings: Affinity) -> None:
        self.network = network
        self.settings = settings

    def about(self) -> dict[str, str]:
        frozen = ", frozen" if self.settings.frozen_backbone else ""
        return {"text": self.settings.backbone.describe() + frozen}

    def new_layers(self) -> Iterable[nn.Module]:
        return self.network.new_layers()

    def loss(self, batch: Batch, epoch: int) -> Tensor:
        assert batch.labels is not None
        logits = self.network(batch.images)
        settings = self.settings
        labels = reduced(batch.labels, logits.shape[2:])
        return affinity_loss(logits, labels, settings.radius, settings.pairs == "inner")


def main(work: Work) -> None:
    settings: Affinity = work.job.block
    fit(work, lambda network, _dataset: AffinityTask(network, settings), RasterStore(work.inputs["labels"]))


if __name__ == "__main__":
    run("affinity", main)
