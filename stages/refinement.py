"""Train a refinement network on stored maps."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pipeline.data.collation import on_device
from pipeline.data.geometry import to_windows
from pipeline.data.loading import Batch
from pipeline.refinement.base import RefinementNetwork
from pipeline.stores.raster import RasterStore
from pipeline.training.loop import Stateless
from pipeline.workflow.fit import fit
from pipeline.workflow.stage import Work, run


class RefinementTask(Stateless):
    """The training task of a refinement network, supervised by the maps of the training set."""

    def __init__(self, network: RefinementNetwork) -> None:
        self.network = network

    def about(self) -> dict[str, str]:
        return self.network.about()

    def new_layers(self) -> Iterable[nn.Module]:
        return self.network.new_layers()

    @property
    def is_mean(self) -> bool:  # type: ignore[override]
        return self.network.is_mean

    def loss(self, batch: Batch, epoch: int) -> Tensor:
        return self.network.loss(batch.images, lambda size: attention(batch, size), batch.tags)


def attention(batch: Batch, size: tuple[int, int]) -> Tensor:
    """Return the target, B x K x h x w in [0, 1]: the stored maps in each sample's window; 0 for absent classes.

    Only the maps of present classes are resampled, on the training device.
    """
    assert batch.maps is not None
    target = torch.zeros(len(batch.ids), batch.tags.shape[1], *size, device=batch.images.device)
    for rasters, pairs in batch.maps.by_shape():
        maps = to_windows(rasters.float() / 255, [batch.windows[sample] for sample, _ in pairs], size)
        at = on_device(torch.tensor(pairs), target.device)
        target[at[:, 0], at[:, 1]] = maps
    return target


def main(work: Work) -> None:
    fit(work, lambda network, _dataset: RefinementTask(network), maps=RasterStore(work.inputs["maps"]))


if __name__ == "__main__":
    run("refinement", main)
