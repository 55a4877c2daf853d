"""Train a one-step network: from tags to masks in one training."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.loading import Batch
from pipeline.methods.agen import Agen, Losses
from pipeline.methods.agen_losses import Map
from pipeline.stage import Work, run
from pipeline.stores.blocks import parallel
from pipeline.training.fit import fit


class OneStepTask:
    """A one-step network, and the means of its losses' terms over the epoch at work."""

    def __init__(self, network: Agen, mapper: Map) -> None:
        """``mapper``: computes the dense CRF; ``map``, or one over worker processes."""
        self.network = network
        self.mapper = mapper
        self.terms: Tensor | None = None  # sums over the epoch's batches, and their number

    def new_layers(self) -> Iterable[nn.Module]:
        return self.network.new_layers()

    def loss(self, batch: Batch, epoch: int) -> Tensor:
        losses = torch.stack(self.network.losses(batch.images, batch.tags, epoch, self.mapper))
        counted = torch.cat([losses.detach().double(), losses.new_ones(1)])
        self.terms = counted if self.terms is None else self.terms + counted
        return losses.sum()

    def end_epoch(self, epoch: int) -> dict[str, float]:
        assert self.terms is not None
        *sums, count = self.terms.tolist()
        self.terms = None
        lambdas = {f"lambda_{stage}": round(weight, 6) for stage, weight in self.network.lambdas().items()}
        return {name: round(value / count, 6) for name, value in zip(Losses._fields, sums, strict=True)} | lambdas

    def state(self) -> dict[str, Any]:
        return {"terms": self.terms}

    def restore(self, state: dict[str, Any]) -> None:
        self.terms = None if state["terms"] is None else state["terms"].to(next(self.network.parameters()).device)


def main(work: Work) -> None:
    workers = work.runtime.workers if work.job.block.boundary_weight > 0 else 0
    with parallel(work.job.label, workers, chunk=1) as mapper:
        fit(work, lambda network, _dataset: OneStepTask(network, mapper))


if __name__ == "__main__":
    run("one_step", main)
