"""Train a segmentation network on label maps: pseudo labels, or masks for the supervised upper bound.

The upper bound is trained on the images that have a mask.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from pipeline.config.schema import Segmentation
from pipeline.data.loading import Batch
from pipeline.networks.segmentation import SegmentationNetwork
from pipeline.stores.raster import RasterStore
from pipeline.training.loop import Stateless
from pipeline.training.segmentation import segmentation_loss
from pipeline.workflow.fit import fit
from pipeline.workflow.stage import Work, run


class SegmentationTask(Stateless):
    """The training task of a segmentation network, supervised by label maps."""

    def __init__(self, network: SegmentationNetwork, settings: Segmentation) -> None:
        self.network = network
        self.settings = settings

    def about(self) -> dict[str, str]:
        return {"text": f"{self.settings.network.settings.describe()}, {self.settings.backbone.describe()}"}

    def new_layers(self) -> Iterable[nn.Module]:
        return [self.network.head]

    def loss(self, batch: Batch, epoch: int) -> Tensor:
        assert batch.labels is not None
        supervised = self.network.supervised(batch.images)
        settings = self.settings
        return segmentation_loss(supervised, batch.labels, batch.tags, settings.loss_size, settings.self_training)


def main(work: Work) -> None:
    settings: Segmentation = work.job.block
    labels, masks = RasterStore(work.inputs["labels"]), settings.labels == "ground_truth"
    share = settings.share
    fit(work, lambda network, _data: SegmentationTask(network, settings), labels, skip_unlabelled=masks, share=share)


if __name__ == "__main__":
    run("segmentation", main)
