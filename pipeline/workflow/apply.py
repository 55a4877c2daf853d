"""The inference of a stage: load the network that its job names, and write what it computes of images."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import nn

from pipeline.data.index import Image, Index
from pipeline.stores.blocks import Row, Writer, write_blocks
from pipeline.training import models
from pipeline.training.settings import prepare
from pipeline.workflow.stage import Work, progress


class Application:
    """A trained network, ready on the job's device.

    Attributes:
        index: the dataset.
        network: the network in ``model``, in evaluation mode.
    """

    def __init__(self, work: Work) -> None:
        """
        Raises:
            PipelineError: the device does not exist, or the network does not fit the dataset or this version.
        """
        runtime = work.runtime
        self._work = work
        self._device = prepare(runtime.device, runtime.threads, runtime.deterministic, runtime.slots)
        self.index = Index(work.inputs["index"])
        self.network: nn.Module = models.load(work.inputs["model"], self.index.num_classes, self._device)

    def write(self, images: Sequence[Image], compute: Callable[..., Iterable[Row]], writer: Writer) -> None:
        """Write what ``compute(network, block, device=device)`` returns for each block of the images.

        Finished blocks survive an interruption, and several ranks share them; only rank 0 returns
        (``pipeline.stores.blocks.write_blocks``).
        """
        function = partial(compute, self.network, device=self._device)
        shown = partial(progress, label=self._work.job.label)
        write_blocks(images, function, writer, self._work.checkpoint, progress=shown)
