"""Segment the evaluation images with a trained segmentation network."""

from functools import partial

from pipeline.data.index import Index
from pipeline.inference.segment import segmentations
from pipeline.stores.blocks import parallel, write_blocks
from pipeline.stores.raster import RasterWriter
from pipeline.training import models
from pipeline.training.settings import prepare
from pipeline.workflow.stage import Work, progress, run


def main(work: Work) -> None:
    device = prepare(work.runtime.device, work.runtime.threads)
    index = Index(work.inputs["index"])
    network = models.load(work.inputs["model"], index.num_classes, device)
    workers = work.runtime.workers if work.job.block.crf else 0
    with RasterWriter(work.outputs["labels"], "labels") as writer, parallel(work.job.label, workers) as mapper:
        compute = partial(
            segmentations,
            network,
            settings=work.job.block,
            device=device,
            mapper=mapper,
            precision=work.job.precision,
        )
        shown = partial(progress, label=work.job.label)
        write_blocks(index.images("evaluation"), compute, writer, work.checkpoint, progress=shown)


if __name__ == "__main__":
    run("prediction", main)
