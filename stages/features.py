"""Compute feature maps of a classifier's layers for the training images that the report shows."""

import json
from functools import partial

from pipeline.data.index import Index
from pipeline.data.sample import choose
from pipeline.inference.features import feature_maps
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
    images = choose(index.images("train"), work.job.params["gallery"])
    with RasterWriter(work.outputs["features"], "features") as writer:
        shown = partial(progress, label=work.job.label)
        write_blocks(images, partial(feature_maps, network, device=device), writer, work.checkpoint, progress=shown)
    work.outputs["layers"].write_text(json.dumps(list(network.layers())) + "\n")


if __name__ == "__main__":
    run("features", main)
