"""Convert the masks in the index to masks.h5, and those of training images to labels.h5, which trainings read.

Images without a mask are absent. No other stage reads mask files.
"""

from pipeline.data.checks import read_mask
from pipeline.data.faults import Faults
from pipeline.data.index import Index
from pipeline.errors import PipelineError
from pipeline.stores.raster import RasterWriter
from pipeline.workflow.stage import Work, progress, run


def main(work: Work) -> None:
    index = Index(work.inputs["index"])
    training = set(index.images("train").ids)
    faults = Faults()
    with (
        RasterWriter(work.outputs["masks"], "labels") as masks,
        RasterWriter(work.outputs["labels"], "labels") as labels,
    ):
        for image in progress(index.images(), work.job.label):
            if image.mask is None:
                continue
            try:
                mask = read_mask(image)
            except PipelineError as error:
                faults.add("changed mask", str(error))
                continue
            masks.append(image.id, mask)
            if image.id in training:
                labels.append(image.id, mask)
        faults.check()


if __name__ == "__main__":
    run("ground_truth", main)
