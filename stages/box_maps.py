"""Compute maps of the highest classes of the evaluation images with a trained classifier."""

from functools import partial

from pipeline.inference.recognize import class_maps
from pipeline.stores.raster import RasterWriter
from pipeline.workflow.apply import Application
from pipeline.workflow.stage import Work, run


def main(work: Work) -> None:
    applied = Application(work, work.job.precision)
    compute = partial(class_maps, settings=work.job.block, precision=work.job.precision)
    with RasterWriter(work.outputs["class_maps"], "boxes") as writer:
        applied.write(applied.index.images("evaluation"), compute, writer, work.job.block.side == "square")


if __name__ == "__main__":
    run("box_maps", main)
