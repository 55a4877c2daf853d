"""Compute localization maps of the training images with a trained network."""

from functools import partial

from pipeline.data.index import Index
from pipeline.inference.localize import localization_maps
from pipeline.stores.blocks import write_blocks
from pipeline.stores.raster import RasterWriter
from pipeline.training import models
from pipeline.training.settings import prepare
from pipeline.workflow.stage import Work, progress, run


def main(work: Work) -> None:
    runtime = work.runtime
    device = prepare(runtime.device, runtime.threads, runtime.deterministic, runtime.slots)
    index = Index(work.inputs["index"])
    network = models.load(work.inputs["model"], index.num_classes, device)
    compute = partial(localization_maps, network, settings=work.job.block, device=device, precision=work.job.precision)
    with RasterWriter(work.outputs["maps"], "localization") as writer:
        shown = partial(progress, label=work.job.label)
        write_blocks(index.images("train"), compute, writer, work.checkpoint, progress=shown)


if __name__ == "__main__":
    run("localization", main)
