"""Compute localization maps of the training images with a trained network."""

from functools import partial

from pipeline.inference.localize import localization_maps
from pipeline.stores.raster import RasterWriter
from pipeline.workflow.apply import Application
from pipeline.workflow.stage import Work, run


def main(work: Work) -> None:
    applied = Application(work, work.job.precision)
    compute = partial(localization_maps, settings=work.job.block, precision=work.job.precision)
    with RasterWriter(work.outputs["maps"], "localization") as writer:
        applied.write(applied.index.images("train"), compute, writer, work.job.block.side == "square")


if __name__ == "__main__":
    run("localization", main)
