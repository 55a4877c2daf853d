"""The training of a stage: build the network of its block, run the training loop, write the model and the log."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from pipeline import arithmetic, ranks
from pipeline.data.index import Image, Index
from pipeline.data.loading import IGNORE, TrainingSet
from pipeline.data.streams import Purpose, chosen
from pipeline.stores.raster import RasterStore
from pipeline.training import distributed, models
from pipeline.training.loop import Loop, Task
from pipeline.training.settings import prepare
from pipeline.workflow.stage import Work

_Task = TypeVar("_Task", bound=Task)


def fit(
    work: Work,
    make: Callable[[Any, TrainingSet], _Task],
    labels: RasterStore | None = None,
    maps: RasterStore | None = None,
    group: Callable[[Any], int] = lambda network: 1,
    helpers: Callable[[Any], int] = lambda network: 0,
    skip_unlabelled: bool = False,
    share: float = 1.0,
) -> _Task:
    """Train the network of the job's block on the training images, and write ``model`` and ``log``.

    Only rank 0 (``pipeline.ranks``) returns; the others end after the training.

    Args:
        make: builds the task from the network and the training images.
        labels: label maps of the images.
        maps: maps of the images' classes, with which their batches come.
        group: returns the number of images in a group that shares a class (``TrainingSet``), for the network.
        helpers: returns how many of the job's worker processes compute the network's losses; the others load images.
        skip_unlabelled: drop images without a label map. It is still an error if no image has one.
        share: the share of the images to train on, for as many steps as on all (``Segmentation.share``).

    Returns:
        The task after training.

    Raises:
        PipelineError: the block does not fit the data, or the training diverged.
    """
    settings, seed, runtime = work.job.block, work.job.params["seed"], work.runtime
    device = prepare(runtime.device, runtime.threads, runtime.deterministic, runtime.slots)
    index = Index(work.inputs["index"])
    images = index.images("train")
    if labels is not None and skip_unlabelled:
        images = images.having(labels.__contains__) or images
    if share < 1:
        drawn = chosen(list(images.ids), max(1, round(share * len(images))), seed, Purpose.SHARE)
        images = images.having(drawn.__contains__)
    torch.manual_seed(seed)
    network = models.build(settings, index.num_classes)
    dataset = TrainingSet(images, index.num_classes, settings.augmentation, seed, labels, group(network), maps)
    task = make(network, dataset)
    helping = helpers(network)
    runtime = replace(runtime, workers=runtime.workers - helping, helpers=helping)
    training, label = settings.training.on_share(share), work.job.label
    log: dict[str, Any] = {"about": task.about()}
    if labels is not None and (warning := empty_labels(labels, images)):
        print(f"warning: {label}: {warning}", flush=True)
        log["warning"] = warning  # for the report
    with distributed.connected(device):
        log |= Loop(task, dataset, training, device, runtime=runtime, path=work.checkpoint, label=label).run()
    ranks.leave()
    log["arithmetic"] = arithmetic.used()
    models.save(work.outputs["model"], network, settings, index.num_classes)
    work.outputs["log"].write_text(json.dumps(log, indent=1) + "\n")
    return task


def empty_labels(labels: RasterStore, images: Sequence[Image]) -> str | None:
    """Return a warning if the label maps contain no object, or nothing but ignored pixels; None otherwise."""
    has_background = False
    for image in images:
        raster = labels.get(image.id)
        known = raster[raster != IGNORE]
        if known.any():
            return None
        has_background = has_background or known.size > 0
    if has_background:
        return f"{labels.path} labels no object pixels, so that the network learns background only; loosen its rule"
    return f"{labels.path} ignores all pixels of all images, so that the network learns nothing; loosen its rule"
