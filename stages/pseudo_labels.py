"""Compute the pseudo labels of the training images from maps, saliency maps and the images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from pipeline.config.schema import PseudoLabels
from pipeline.data.images import read_rgb
from pipeline.data.index import Image, Index
from pipeline.labels.base import IGNORE, Rule
from pipeline.labels.labelling import Normalise, label_image
from pipeline.stores.blocks import Row, parallel, require, write_blocks
from pipeline.stores.raster import Raster, RasterStore, RasterWriter
from pipeline.workflow.stage import Work, progress, run


@dataclass(frozen=True)
class Labeller:
    """Compute the pseudo label of an image. It opens the stores in its own process; ``key`` identifies the contents.

    An image without a class is background throughout, whatever the rule makes of its saliency: its tags say that it
    shows none of the classes, so that nothing in it is in doubt.
    """

    rule: Rule
    normalise: Normalise
    maps: Path
    saliency: Path
    key: str

    def __call__(self, image: Image) -> Raster:
        if not image.tags:
            return np.zeros(image.size, np.uint8)
        stored = _open(self.maps, self.key).maps(image.id)
        maps = {class_id: stored[class_id] for class_id in image.tags if class_id in stored}
        saliency = _open(self.saliency, self.key).get(image.id) if self.rule.needs_saliency else None
        rgb = read_rgb(image) if self.rule.needs_image else None
        return label_image(maps, saliency, rgb, self.rule, self.normalise, (image.height, image.width))


@lru_cache(maxsize=2)
def _open(path: Path, key: str) -> RasterStore:
    return RasterStore(path)


def main(work: Work) -> None:
    block: PseudoLabels = work.job.block
    rule: Rule = block.rule.settings
    images = Index(work.inputs["index"]).images("train")
    require(RasterStore(work.inputs["maps"]), images)
    if rule.needs_saliency:
        require(RasterStore(work.inputs["saliency"]), images)
    labeller = Labeller(rule, block.normalise, work.inputs["maps"], work.inputs["saliency"], work.key)
    with (
        parallel(work.job.label, work.runtime.workers) as each,
        RasterWriter(work.outputs["labels"], "labels") as writer,
    ):

        def compute(part: Sequence[Image]) -> Iterator[Row]:
            return ((image.id, 0, label) for image, label in zip(part, each(labeller, part), strict=True))

        write_blocks(images, compute, writer, work.checkpoint, progress=partial(progress, label=work.job.label))
    labels = RasterStore(work.outputs["labels"])
    if not any(((label > 0) & (label != IGNORE)).any() for label in map(labels.get, labels)):
        print(f"warning: {work.job.label}: labels no object pixels; its maps are empty or below the rule's thresholds")


if __name__ == "__main__":
    run("pseudo_labels", main)
