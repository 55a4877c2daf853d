"""Segment the evaluation images with a trained segmentation network, and write its model file for new photos.

The label maps go to labels.h5. doubt.h5 says how sure the network is of each part of an image, for the report.
"""

from functools import partial
from typing import Any

from pipeline.inference import model_file
from pipeline.inference.segment import DOUBT, LABELS, segmentations
from pipeline.stores import manifest
from pipeline.stores.blocks import Writers, parallel
from pipeline.stores.raster import RasterWriter
from pipeline.workflow.apply import Application
from pipeline.workflow.stage import Work, run


def main(work: Work) -> None:
    applied = Application(work, work.job.precision)
    workers = work.runtime.workers if work.job.block.crf else 0
    with (
        RasterWriter(work.outputs["labels"], "labels") as labels,
        RasterWriter(work.outputs["doubt"], "doubt") as doubt,
        parallel(work.job.label, workers) as mapper,
    ):
        compute = partial(segmentations, settings=work.job.block, mapper=mapper, precision=work.job.precision)
        writer = Writers({LABELS: labels, DOUBT: doubt})
        applied.write(applied.index.images("evaluation"), compute, writer)
    megapixels = work.job.params["dataset.working_megapixels"]
    model_file.write(
        work.outputs["model"],
        work.inputs["model"],
        applied.index.classes,
        work.job.block,
        megapixels,
        _provenance(work),
    )


def _provenance(work: Work) -> dict[str, Any]:
    """Where the network comes from. Code and versions are those of its training."""
    training = manifest.read(work.inputs["model"].parent) or {}
    origin = {"row": work.job.name, **{key: work.job.params[key] for key in ("experiment", "seed")}}
    return origin | {key: training.get(key) for key in ("code", "versions")}


if __name__ == "__main__":
    run("prediction", main)
