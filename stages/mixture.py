"""Replace the pseudo labels of a share of the training images with their masks (OAA Table 7).

The share is a fraction of all training images. The images are drawn from those that have masks.
"""

from pipeline.config.schema import Mixture
from pipeline.data.index import Index
from pipeline.data.streams import Purpose, chosen
from pipeline.errors import PipelineError
from pipeline.stores.raster import RasterStore, RasterWriter
from pipeline.workflow.stage import Work, progress, run


def main(work: Work) -> None:
    mixture: Mixture = work.job.block
    ids = list(Index(work.inputs["index"]).images("train").ids)
    labels, masks = RasterStore(work.inputs["labels"]), RasterStore(work.inputs["ground_truth"])
    masked = [image_id for image_id in ids if image_id in masks and masks.classes(image_id)]
    count = round(mixture.share * len(ids))
    if count > len(masked):
        raise PipelineError(
            f"{masks.path}: has masks of {len(masked)} training images, but a share of {mixture.share:g} of all "
            f"{len(ids)} is {count}; add masks to the dataset, or lower the share"
        )
    annotated = chosen(masked, count, work.job.params["seed"], Purpose.MIXTURE)
    with RasterWriter(work.outputs["labels"], "labels") as writer:
        for image_id in progress(ids, work.job.label):
            writer.append(image_id, (masks if image_id in annotated else labels).get(image_id))


if __name__ == "__main__":
    run("mixture", main)
