"""Compute feature maps of a classifier's layers for the training images that the report shows."""

import json

from pipeline.data.sample import choose
from pipeline.inference.features import feature_maps
from pipeline.methods.base import Method
from pipeline.stores.raster import RasterWriter
from pipeline.workflow.apply import Application
from pipeline.workflow.stage import Work, run


def main(work: Work) -> None:
    applied = Application(work, "fp32")
    assert isinstance(applied.network, Method)
    images = choose(applied.index.images("train"), work.job.params["gallery"])
    with RasterWriter(work.outputs["features"], "features") as writer:
        applied.write(images, feature_maps, writer)
    work.outputs["layers"].write_text(json.dumps(list(applied.network.layers())) + "\n")


if __name__ == "__main__":
    run("features", main)
