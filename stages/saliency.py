"""Compute or copy the saliency map of every training image, at the size of the image."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from pipeline.config.dataset import Saliency
from pipeline.data.faults import Faults
from pipeline.data.images import read_rgb
from pipeline.data.index import Image, Index
from pipeline.errors import PipelineError
from pipeline.labels import saliency
from pipeline.stores.blocks import Row, listed, parallel, write_blocks
from pipeline.stores.raster import Raster, RasterWriter, open_foreign
from pipeline.workflow.stage import Work, progress, run

Source = Callable[[Image], Raster]


def main(work: Work) -> None:
    settings: Saliency = work.job.block
    images = Index(work.inputs["index"]).images("train")
    with RasterWriter(work.outputs["maps"], "saliency") as writer:
        if settings.kind == "none":
            for image in images:
                writer.add_image(image.id)
            return
        # Reading from a raster store is too fast to benefit from worker processes.
        workers = 0 if settings.kind == "store" else work.runtime.workers
        source = partial(_attempt, _source(settings, work.inputs, images))
        with parallel(work.job.label, workers) as each:

            def compute(block: Sequence[Image]) -> Iterator[Row]:
                results = list(each(source, block))
                faults = Faults()
                for result in results:
                    if isinstance(result, PipelineError):
                        faults.add("unfit saliency map", str(result))
                faults.check()
                return ((image.id, 0, raster) for image, raster in zip(block, results, strict=True))

            write_blocks(images, compute, writer, work.checkpoint, progress=partial(progress, label=work.job.label))


def _source(settings: Saliency, inputs: dict[str, Path], images: Sequence[Image]) -> Source:
    """Return the function that yields the map of an image.

    Raises:
        PipelineError: maps are missing. This is checked before any map is read.
    """
    if settings.kind == "folder":
        missing = [image.id for image in images if not (image.saliency and image.saliency.is_file())]
        _refuse_missing(str(settings.path), missing)
        return saliency.read_file
    if settings.kind == "store":
        store = open_foreign(inputs["store"])
        missing = [image.id for image in images if image.id not in store or 0 not in store.classes(image.id)]
        _refuse_missing(str(store.path), missing)
        return partial(saliency.read_stored, store)
    if settings.kind == "rembg":
        saliency.u2net()
        return _find_objects
    saliency.detector(settings.kind)
    return partial(_detect, settings.kind)


def _refuse_missing(where: str, missing: list[str]) -> None:
    if missing:
        raise PipelineError(
            f"{where}: no saliency map of {len(missing)} images: {listed(missing)}; add them, or set saliency.kind"
        )


def _attempt(source: Source, image: Image) -> Raster | PipelineError:
    """Return a fault instead of raising it, so that all faults of a block are reported together."""
    try:
        return source(image)
    except PipelineError as fault:
        return fault


def _find_objects(image: Image) -> Raster:
    return saliency.salient_objects(read_rgb(image))


def _detect(kind: str, image: Image) -> Raster:
    return saliency.detect(read_rgb(image), kind)


if __name__ == "__main__":
    run("saliency", main)
