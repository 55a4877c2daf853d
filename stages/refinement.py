"""Train a refinement network on stored maps."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pipeline.data.geometry import to_window
from pipeline.data.loading import Batch
from pipeline.refinement.base import RefinementNetwork
from pipeline.stores.raster import RasterStore
from pipeline.training.loop import Stateless
from pipeline.workflow.fit import fit
from pipeline.workflow.stage import Work, run


class RefinementTask(Stateless):
    """The training task of a refinement network, supervised by stored maps."""

    def __init__(self, network: RefinementNetwork, maps: RasterStore) -> None:
        self.network = network
        self.maps = maps

    def about(self) -> dict[str, str]:
        return self.network.about()

    def new_layers(self) -> Iterable[nn.Module]:
        return self.network.new_layers()

    def loss(self, batch: Batch, epoch: int) -> Tensor:
        return self.network.loss(batch.images, lambda size: self.attention(batch, size), batch.tags)

    def attention(self, batch: Batch, size: tuple[int, int]) -> Tensor:
        """Return the target, B x K x h x w in [0, 1]: the stored maps in each sample's window; 0 for absent classes."""
        target = torch.zeros(len(batch.ids), batch.tags.shape[1], *size)
        for sample, (image_id, window) in enumerate(zip(batch.ids, batch.windows, strict=True)):
            for tag, raster in self.maps.maps(image_id).items():
                target[sample, tag - 1] = to_window(torch.from_numpy(raster)[None].float() / 255, window, size)[0]
        return target


def main(work: Work) -> None:
    maps = RasterStore(work.inputs["maps"])
    fit(work, lambda network, _dataset: RefinementTask(network, maps))


if __name__ == "__main__":
    run("refinement", main)
