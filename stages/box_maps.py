"""Compute maps of the highest classes of the evaluation images with a trained classifier."""

from functools import partial

from pipeline.data.index import Index
from pipeline.inference.recognize import class_maps
from pipeline.methods.base import Method
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
    assert isinstance(network, Method)
    compute = partial(class_maps, network, settings=work.job.block, device=device, precision=work.job.precision)
    with RasterWriter(work.outputs["class_maps"], "boxes") as writer:
        shown = partial(progress, label=work.job.label)
        write_blocks(index.images("evaluation"), compute, writer, work.checkpoint, progress=shown)


if __name__ == "__main__":
    run("box_maps", main)
