"""Propagate the maps of the training images by a random walk over the affinities of a trained network."""

from functools import partial

from pipeline.data.index import Index
from pipeline.inference.walk import walked_maps
from pipeline.stores.blocks import require, write_blocks
from pipeline.stores.raster import RasterStore, RasterWriter
from pipeline.training import models
from pipeline.training.settings import prepare
from pipeline.workflow.stage import Work, progress, run


def main(work: Work) -> None:
    runtime = work.runtime
    device = prepare(runtime.device, runtime.threads, runtime.deterministic, runtime.slots)
    index = Index(work.inputs["index"])
    images, maps = index.images("train"), RasterStore(work.inputs["maps"])
    require(maps, images)
    network = models.load(work.inputs["model"], index.num_classes, device)
    compute = partial(walked_maps, network, maps, settings=work.job.block, device=device, precision=work.job.precision)
    with RasterWriter(work.outputs["maps"], "localization") as writer:
        write_blocks(images, compute, writer, work.checkpoint, progress=partial(progress, label=work.job.label))


if __name__ == "__main__":
    run("walk", main)
