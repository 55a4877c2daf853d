"""Propagate the maps of the training images by a random walk over the affinities of a trained network."""

from functools import partial

from pipeline.inference.walk import walked_maps
from pipeline.stores.blocks import require
from pipeline.stores.raster import RasterStore, RasterWriter
from pipeline.workflow.apply import Application
from pipeline.workflow.stage import Work, run


def main(work: Work) -> None:
    applied = Application(work, work.job.precision)
    images, maps = applied.index.images("train"), RasterStore(work.inputs["maps"])
    require(maps, images)
    compute = partial(walked_maps, maps=maps, settings=work.job.block, precision=work.job.precision)
    with RasterWriter(work.outputs["maps"], "localization") as writer:
        applied.write(images, compute, writer)


if __name__ == "__main__":
    run("walk", main)
