"""Convert the masks in the index to labels.h5. Images without a mask are absent. No other stage reads mask files."""

from pipeline.data.checks import read_mask
from pipeline.data.faults import Faults
from pipeline.data.index import Index
from pipeline.errors import PipelineError
from pipeline.stores.raster import RasterWriter
from pipeline.workflow.stage import Work, progress, run


def main(work: Work) -> None:
    images = [image for image in Index(work.inputs["index"]).images() if image.mask]
    faults = Faults()
    with RasterWriter(work.outputs["labels"], kind="labels") as writer:
        for image in progress(images, work.job.label):
            try:
                writer.append(image.id, read_mask(image))
            except PipelineError as error:
                faults.add("changed mask", str(error))
        faults.check()


if __name__ == "__main__":
    run("ground_truth", main)
