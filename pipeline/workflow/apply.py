"""The inference of a stage: load the network that its job names, and write what it computes of images."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn

from pipeline.data.index import Image, Index
from pipeline.inference.folding import placed
from pipeline.inference.shapes import FewShapes, differ
from pipeline.stores.blocks import Row, Writer, write_blocks
from pipeline.training import models
from pipeline.training.settings import prepare
from pipeline.workflow.stage import Work, progress


class Application:
    """A trained network, ready on the job's device.

    Attributes:
        index: the dataset.
        network: the network in ``model``, in evaluation mode. If it computes in bf16, it is folded
            (``pipeline.inference.folding``).
    """

    def __init__(self, work: Work, precision: str) -> None:
        """
        Args:
            precision: in which the network will compute; 'auto', 'bf16' or 'fp32'.

        Raises:
            PipelineError: the device does not exist, or the network does not fit the dataset or this version.
        """
        runtime = work.runtime
        self._work = work
        self._device = prepare(runtime.device, runtime.threads, runtime.deterministic, runtime.slots)
        self.index = Index(work.inputs["index"])
        network = models.load(work.inputs["model"], self.index.num_classes, torch.device("cpu"))
        self.network: nn.Module = placed(network, self._device, precision)

    def write(
        self, images: Sequence[Image], compute: Callable[..., Iterable[Row]], writer: Writer, resized: bool = False
    ) -> None:
        """Write what ``compute(network, block, device=device)`` returns for each block of the images.

        Finished blocks survive an interruption, and several ranks share them; only rank 0 returns
        (``pipeline.stores.blocks.write_blocks``).

        Args:
            resized: whether the network sees all images at one size.
        """
        function = partial(compute, self.network, device=self._device)
        shown = partial(progress, label=self._work.job.label)
        pads = self._device.type == "cuda" and not resized and differ(image.size for image in images)
        with FewShapes() if pads else nullcontext():
            write_blocks(images, function, writer, self._work.checkpoint, progress=shown)
