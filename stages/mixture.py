"""index, labels, ground_truth -> labels: pseudo labels of which a share of images carry their masks (OAA Table 7)."""

import numpy as np

from pipeline.data.index import Index
from pipeline.errors import PipelineError
from pipeline.schema import Mixture
from pipeline.stage import Work, progress, run
from pipeline.stores.blocks import listed
from pipeline.stores.raster import RasterStore, RasterWriter


def main(work: Work) -> None:
    mixture: Mixture = work.job.block
    ids = [image.id for image in Index(work.inputs["index"]).images("train")]
    labels, masks = RasterStore(work.inputs["labels"]), RasterStore(work.inputs["ground_truth"])
    annotated = chosen(ids, mixture.share, work.job.params["seed"])
    bare = [
        image_id for image_id in ids if image_id in annotated and not (image_id in masks and masks.classes(image_id))
    ]
    if bare:
        raise PipelineError(
            f"{masks.path}: no mask of {len(bare)} of the images drawn: {listed(bare)}; add masks to the dataset"
        )
    with RasterWriter(work.outputs["labels"], "labels") as writer:
        for image_id in progress(ids, work.job.label):
            writer.append(image_id, (masks if image_id in annotated else labels).get(image_id))


def chosen(ids: list[str], share: float, seed: int) -> set[str]:
    """A seeded random share of the images; with one seed, a smaller share lies within a larger."""
    order = np.random.default_rng(seed).permutation(len(ids))
    return {ids[number] for number in order[: round(share * len(ids))]}


if __name__ == "__main__":
    run("mixture", main)
