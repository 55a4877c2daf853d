"""Train a one-step network, which learns to predict masks from tags in a single training."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.loading import Batch
from pipeline.methods.one_step import Mapper, OneStepNetwork
from pipeline.stores.blocks import parallel
from pipeline.training import distributed
from pipeline.workflow.fit import fit
from pipeline.workflow.stage import Work, run


class OneStepTask:
    """The training task of a one-step network. It logs the mean of each loss term over an epoch."""

    def __init__(self, network: OneStepNetwork, mapper: Mapper) -> None:
        """``mapper`` is ``map`` or its equivalent over worker processes."""
        self.network = network
        self.mapper = mapper
        self.names: list[str] = []  # of the loss terms
        self.terms: Tensor | None = None  # sums over the batches of the epoch, then the number of batches

    def about(self) -> dict[str, str]:
        return self.network.about()

    def new_layers(self) -> Iterable[nn.Module]:
        return self.network.new_layers()

    is_mean = False
    unit = 1

    def loss(self, batch: Batch, epoch: int) -> Tensor:
        losses_by_name = self.network.losses(batch.images, batch.tags, epoch, self.mapper)
        self.names = list(losses_by_name)
        losses = torch.stack(list(losses_by_name.values()))
        counted = torch.cat([distributed.mean(losses.detach().double()), losses.new_ones(1)])
        self.terms = counted if self.terms is None else self.terms + counted
        return losses.sum()

    def end_batch(self) -> None:
        pass

    def end_epoch(self, epoch: int) -> dict[str, float]:
        assert self.terms is not None
        *sums, count = self.terms.tolist()
        self.terms = None
        means = dict(zip(self.names, (value / count for value in sums), strict=True))
        return {name: round(value, 6) for name, value in (means | self.network.logged()).items()}

    def state(self) -> dict[str, Any]:
        return {"names": self.names, "terms": self.terms}

    def restore(self, state: dict[str, Any]) -> None:
        self.names = state["names"]
        self.terms = None if state["terms"] is None else state["terms"].to(next(self.network.parameters()).device)


def main(work: Work) -> None:
    def crf_processes(network: OneStepNetwork) -> int:
        """Most workers, since an image's CRF takes several times as long as its loading."""
        workers = work.runtime.workers
        loaders = max(1, workers // 4) if workers > 1 else 0
        return workers - loaders if network.uses_mapper else 0

    with ExitStack() as stack:

        def task_of(network: OneStepNetwork, _dataset: Any) -> OneStepTask:
            mapper = parallel(work.job.label, crf_processes(network), chunk=1)
            return OneStepTask(network, stack.enter_context(mapper))

        fit(work, task_of, helpers=crf_processes)


if __name__ == "__main__":
    run("one_step", main)
