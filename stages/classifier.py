"""Train an image-level classifier and accumulate its attention during training (OAA)."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipeline import ranks
from pipeline.config.schema import Classifier
from pipeline.data.index import Image
from pipeline.data.loading import Batch, TrainingSet
from pipeline.errors import PipelineError
from pipeline.methods.attention_drop import AttentionDropLayer
from pipeline.methods.base import Method
from pipeline.methods.oaa import AttentionAccumulator, Taken
from pipeline.stores.files import sha256
from pipeline.stores.raster import RasterStore, RasterWriter
from pipeline.training.loop import extent
from pipeline.workflow.fit import fit
from pipeline.workflow.stage import Work, run


class ClassifierTask:
    """The training task of a method, with attention accumulation and, optionally, the attention drop layer."""

    def __init__(self, network: Method, images: Sequence[Image], epochs: int, seed: int, work: Work) -> None:
        self.network = network
        self.settings: Classifier = work.job.block
        drop = self.settings.attention_drop
        self.accumulator = AttentionAccumulator(images, self.settings.accumulate, epochs, keep_last=drop is not None)
        self.drop = AttentionDropLayer(drop, self.accumulator, seed) if drop else None
        self.taken: Taken | None = None  # the maps of the last loss
        self.work = work
        self.snapshots: list[str] = []  # sha256 of the snapshot of each completed epoch

    def about(self) -> dict[str, str]:
        return self.network.about()

    def new_layers(self) -> Iterable[nn.Module]:
        return self.network.new_layers()

    @property
    def is_mean(self) -> bool:
        return self.network.is_mean

    @property
    def unit(self) -> int:
        return self.network.unit

    def loss(self, batch: Batch, epoch: int) -> Tensor:
        images, occluded = batch.images, None
        tags = self.accumulator.tags(batch.ids, batch.tags.shape[1])  # reading them from a GPU would wait for it
        if self.drop is not None:
            size = (images.shape[2], images.shape[3])
            mask = self.drop.mask(batch.ids, tags, batch.windows, size, epoch, images.device)
            if self.drop.settings.target == "image":
                images = images.masked_fill(mask, 0)  # the mean colour
            else:
                occluded = mask
        loss, output = self.network.training_step(images, batch.tags, epoch, occluded)
        if self.network.learns_attention:
            cells = output.maps.shape[2], output.maps.shape[3]
            attention, known = self.accumulator.cumulative(batch.ids, tags, batch.windows, cells, images.device)
            loss = loss + self.network.attention_loss(output, attention, known, batch.tags)
        self.taken = self.accumulator.take(output.maps, output.logits, tags, batch.ids, batch.windows, epoch)
        return loss

    def end_batch(self) -> None:
        """Fuse the maps of the last loss, while a GPU runs the backward pass."""
        if self.taken is not None:
            self.accumulator.fuse(self.taken)
            self.taken = None

    def end_epoch(self, epoch: int) -> dict[str, float]:
        self.accumulator.merge()
        if self.settings.accumulate.snapshots and ranks.place().rank == 0:
            path = snapshot(self.work, epoch)
            self.accumulator.dump(path)
            self.snapshots.append(sha256(path))
        accumulator = self.accumulator
        return {
            "maps_seen": round(accumulator.share_seen(), 6),
            "mean_attention": round(accumulator.mean_attention(), 6),
        }

    def state(self) -> dict[str, Any]:
        self.accumulator.merge()
        return {"accumulator": self.accumulator.state(), "snapshots": self.snapshots}

    def restore(self, state: dict[str, Any]) -> None:
        self.accumulator.restore(state["accumulator"])
        self.snapshots = list(state["snapshots"])
        self.check_snapshots()

    def check_snapshots(self) -> None:
        """Compare the snapshots of all completed epochs with the checksums in the checkpoint.

        Raises:
            PipelineError: a snapshot is damaged or missing. It can only be computed again by the same training.
        """
        for epoch, expected in enumerate(self.snapshots):
            path = snapshot(self.work, epoch)
            actual = sha256(path) if path.exists() else None
            if actual != expected:
                raise PipelineError(
                    f"{path}: {'missing' if actual is None else 'damaged'}: the maps after epoch {epoch + 1} of an "
                    f"interrupted training; to train again from its start: rm {self.work.checkpoint}*"
                )


def snapshot(work: Work, epoch: int) -> Path:
    """Return the temporary file of the cumulative maps of an epoch."""
    return work.checkpoint.with_name(f"{work.checkpoint.name}-epoch-{epoch:03d}.h5")


def join_snapshots(work: Work, task: ClassifierTask) -> None:
    """Merge the maps of all epochs into one store. Image ids are EPOCH/IMAGE; epochs count from 1.

    Raises:
        PipelineError: the maps of an epoch are damaged or missing.
    """
    task.check_snapshots()
    with RasterWriter(work.outputs["snapshots"], "snapshots") as writer:
        for epoch in range(len(task.snapshots)):
            store = RasterStore(snapshot(work, epoch))
            for image_id in store:
                for class_id, raster in store.maps(image_id).items():
                    writer.append(f"{epoch + 1}/{image_id}", raster, class_id)


def main(work: Work) -> None:
    settings: Classifier = work.job.block

    def task_of(network: Method, dataset: TrainingSet) -> ClassifierTask:
        epochs = extent(settings.training, len(dataset)).epochs
        return ClassifierTask(network, dataset.images, epochs, dataset.seed, work)

    task = fit(work, task_of, group=lambda network: network.companions)
    task.accumulator.dump(work.outputs["maps"])
    join_snapshots(work, task)


if __name__ == "__main__":
    run("classifier", main)
