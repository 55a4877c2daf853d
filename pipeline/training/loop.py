"""The training loop of all networks. A ``Task`` provides the network and its loss.

A training that was killed resumes from its last checkpoint. On the same kind of CPU and with as many threads, it ends
with exactly the same bytes as an uninterrupted one: augmentation depends only on seed, epoch and image, the batches of
an optimizer step only on seed, epoch and step, and checkpoints include the state of torch's random generators
(dropout). On CUDA the loop restores the same state, but many kernels add in any order, unless the stage runs with
``--deterministic``. In another arithmetic (``pipeline.arithmetic``) a training goes on, says so, and records both.

On CUDA the loop itself waits for the device only to log a loss, at checkpoints and at the end of an epoch. Two tasks
wait in every step: one that accumulates attention reads its maps after the backward pass (OAA), and the CRF of AGEN's
boundary loss computes on the CPU.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pipeline import arithmetic, interrupts, memory, ranks
from pipeline.config.schema import Training
from pipeline.data.collation import LoadedBatch, joined
from pipeline.data.loader import load, loading_plan
from pipeline.data.loading import Batch, TrainingSet
from pipeline.errors import PipelineError
from pipeline.networks.finite import listed, not_finite
from pipeline.runtime import Runtime, cache_budget
from pipeline.training import checkpoint, distributed
from pipeline.training.settings import (
    autocast,
    build_optimizer,
    describe,
    learning_rate,
    parameter_groups,
    uses_bf16,
)

# Seconds. A longer save extends the interval between checkpoints in proportion, so that at the default interval of 60 s
# saves take 1 % of the time at most.
SLOW_SAVE = 0.6
LOGGED = 20  # maximum number of logged losses per epoch
MERGED_PIXELS = 512 * 1024  # of a batch that is merged from smaller ones: about five images of 321 pixels


class Task(Protocol):
    """A network and its loss, as the loop needs them."""

    @property
    def network(self) -> nn.Module: ...

    def about(self) -> dict[str, str]:
        """The report's description of the network: 'text', and further keys that ``pipeline.report`` reads."""

    def new_layers(self) -> Iterable[nn.Module]:
        """The layers added to the backbone, whose learning rate is ``lr_new`` times the base rate."""

    @property
    def is_mean(self) -> bool:
        """Whether the loss of a batch is the mean of its images' losses, for a network that treats them separately."""

    @property
    def unit(self) -> int:
        """The number of consecutive images of a batch that one process must compute together."""

    def loss(self, batch: Batch, epoch: int) -> Tensor:
        """Compute the scalar loss of a batch on the training device. A mean over anything but images is a ``ratio``."""

    def end_batch(self) -> None:
        """Called once after the backward pass of each loss, which a GPU may still be computing."""

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Called once after each epoch; returns values to log."""

    def state(self) -> dict[str, Any]:
        """State to store in checkpoints, besides network and optimizer."""

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the result of ``state``."""


class Stateless:
    """No-op state hooks for tasks without state of their own."""

    is_mean = False
    unit = 1

    def end_batch(self) -> None:
        pass

    def end_epoch(self, epoch: int) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


class Extent(NamedTuple):
    """The length of a training."""

    batches: int  # per epoch
    steps_per_epoch: int  # optimizer steps per epoch
    steps: int  # total optimizer steps
    epochs: int  # including a last, incomplete one


def extent(settings: Training, images: int) -> Extent:
    """Compute the length of a training on ``images`` images."""
    batches = -(-images // settings.batch_size)
    steps_per_epoch = -(-batches // settings.accumulation)
    steps = settings.iterations or (settings.epochs or 0) * steps_per_epoch
    return Extent(batches, steps_per_epoch, steps, -(-steps // steps_per_epoch))


def alike(group: Sequence[LoadedBatch]) -> Iterator[list[LoadedBatch]]:
    """Lists of batches of the same shape, in order of the first of them, with ``MERGED_PIXELS`` at most."""
    by_shape: dict[torch.Size, list[LoadedBatch]] = {}
    for batch in group:
        by_shape.setdefault(batch.pixels.shape, []).append(batch)
    for shape, batches in by_shape.items():
        most = max(1, MERGED_PIXELS // shape[:3].numel())
        for start in range(0, len(batches), most):
            yield batches[start : start + most]


def has_batch_statistics(network: nn.Module) -> bool:
    """Whether a batch norm in training mode makes an image's output depend on the others of its batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in network.modules())


class Loop:
    """Train ``task`` on ``dataset``; ``run`` returns the log."""

    def __init__(
        self,
        task: Task,
        dataset: TrainingSet,
        settings: Training,
        device: torch.device,
        *,
        runtime: Runtime,
        path: Path | None = None,
        label: str = "training",
    ) -> None:
        self.task, self.dataset, self.settings, self.device = task, dataset, settings, device
        self.every, self.path, self.label = runtime.checkpoint_every, path, label
        on_gpu = device.type == "cuda"
        self.plan = loading_plan(dataset, settings.batch_size, runtime.workers, label, on_gpu, task.unit)
        self.batches, self.steps_per_epoch, self.steps, self.epochs = extent(settings, len(dataset))
        if self.epochs > 1:
            self._keep_images(cache_budget(runtime))
        task.network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        distributed.prepare(task.network)
        groups = parameter_groups(task.network, task.new_layers(), settings)
        self.optimizer = build_optimizer(groups, settings)
        self.epoch = self.step = 0
        self.batches_done = 0  # in this epoch
        self.log: dict[str, list[dict[str, float]]] = {"steps": [], "epochs": []}
        self.sum = torch.zeros((), dtype=torch.float64, device=device)  # sum of this epoch's losses
        self.waited = 0.0  # seconds of this epoch in which the loop waited for batches

    def _keep_images(self, budget: int) -> None:
        """Keep decoded images in memory; say so if not all of them fit."""
        kept = self.dataset.keep(budget, memory.available() // 4)
        if kept < len(self.dataset):
            print(
                f"{self.label}: {kept} of {len(self.dataset)} decoded images fit into {budget / 1e9:.2g} GB of memory; "
                "the others are decoded in each epoch (--cache GB or WSSS_CACHE sets the memory)",
                flush=True,
            )

    def run(self) -> dict[str, Any]:
        """Train until the end and return the log.

        On a stop request (``pipeline.interrupts``) the loop completes the current optimizer step and saves its state.

        Raises:
            PipelineError: the loss or a weight is not finite, or the data loader failed.
            Stopped: a stop was requested; the checkpoint includes every completed step.
        """
        with interrupts.deferred():
            self._resume()
            self.task.network.train()
            saved_at, saved_step, begun = time.monotonic(), self.step, time.monotonic()
            interval, is_first = self.every, ranks.place().rank == 0  # the first rank writes, and says when
            epochs = range(self.epoch, self.epochs)
            with closing(load(self.dataset, self.settings.batch_size, epochs, self.batches_done, self.plan)) as batches:
                while self.step < self.steps:
                    self._train(self._next_group(batches))
                    if self.batches_done == self.batches or self.step == self.steps:
                        self._end_epoch(time.monotonic() - begun)
                        begun = time.monotonic()
                    due = is_first and time.monotonic() - saved_at >= interval
                    if distributed.agreed(interrupts.requested() or due):
                        start = time.monotonic()
                        self._save()
                        self._stop_if_asked()
                        saved_at, saved_step = time.monotonic(), self.step
                        interval = self.every * max(1, (saved_at - start) / SLOW_SAVE)
            if self.step > saved_step:  # the stage's next steps, such as writing maps, may be interrupted as well
                self._save()
        return self.log

    def _stop_if_asked(self) -> None:
        if distributed.agreed(interrupts.requested()):
            ranks.leave()
            interrupts.say(f"{self.label}: state saved at epoch {self.epoch + 1}, step {self.step}")
            interrupts.check()

    def _next_group(self, batches: Iterator[LoadedBatch]) -> list[LoadedBatch]:
        """Load the batches of the next optimizer step; the last group of an epoch may be smaller."""
        start = time.monotonic()
        size = min(self.settings.accumulation, self.batches - self.batches_done)
        group = [next(batches) for _ in range(size)]
        self.waited += time.monotonic() - start
        self.batches_done += size
        return group

    def _train(self, group: Sequence[LoadedBatch]) -> None:
        """Run an optimizer step on the mean loss of these batches, or of this process's parts of them."""
        first = self.batches_done - len(group)
        for number, batches in enumerate(alike(group) if self._merges else [[batch] for batch in group], first):
            with distributed.batch(self._images(number), self.task.unit, batches[0].pixels.shape[1:3]) as counts:
                with autocast(self.device, self.settings.precision):
                    loss = self.task.loss(joined([batch.to(self.device) for batch in batches]), self.epoch)
                value = distributed.mean(loss.detach())
                if self.device.type == "cpu":
                    self._finite(float(value), self.step)
                (distributed.weighted(loss) / (len(group) / len(batches))).backward()  # type: ignore[no-untyped-call]
                self.sum += value.double() * len(batches)
                if counts:
                    self.task.end_batch()
        distributed.sum_gradients(self.optimizer)
        if self._images(self.batches_done - 1) < self.settings.batch_size:
            distributed.align_generators(self.device)
        rate = learning_rate(self.settings, self.step, self.steps_per_epoch, self.steps)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate * parameters["multiplier"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # On a GPU, reading a loss waits for the device, so that losses between logged steps are checked by their sum.
        if self.step % max(1, self.steps_per_epoch // LOGGED) == 0:
            logged = round(self._finite(float(value), self.step), 6)
            self.log["steps"].append({"step": self.step, "epoch": self.epoch, "loss": logged, "lr": rate})
        self.step += 1

    def _images(self, number: int) -> int:
        """The number of images of a batch of an epoch; the last one may have fewer."""
        size = self.settings.batch_size
        return min(size, len(self.dataset) - number * size)

    @property
    def _merges(self) -> bool:
        """Whether batches of an optimizer step become one where their shapes agree, which gives the same gradient.

        Small batches leave a GPU idle. On a CPU nothing is won.
        """
        if self.device.type != "cuda" or distributed.processes() > 1:
            return False
        return self.task.is_mean and not has_batch_statistics(self.task.network)

    def _finite(self, loss: float, step: int) -> float:
        if not math.isfinite(loss):
            raise PipelineError(f"{self.label}: the loss is {loss} at step {step}; lower training.lr")
        return loss

    def _check_weights(self) -> None:
        if bad := not_finite(self.task.network.state_dict()):
            raise PipelineError(f"{self.label}: {listed(bad)} after step {self.step - 1}; lower training.lr")

    def _end_epoch(self, seconds: float) -> None:
        mean = self._finite(float(self.sum) / self.batches_done, self.step - 1)
        self._check_weights()
        if mean == 0:
            interrupts.say(
                f"warning: {self.label}: the loss of epoch {self.epoch + 1} is exactly 0: the network learned nothing, "
                "perhaps because all pixels of its labels are ignored"
            )
        entry = {"epoch": self.epoch, "loss": round(mean, 6), **self.task.end_epoch(self.epoch)}
        self.log["epochs"].append(entry)
        self.sum.zero_()
        self.epoch += 1
        self.batches_done = 0
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in entry.items() if key != "epoch")
        waited, self.waited = self.waited, 0.0
        speed = f"{seconds:.1f} s, of which {waited / max(seconds, 1e-9):.0%} loading"
        interrupts.say(f"{self.label}: epoch {self.epoch}/{self.epochs}: {numbers}; {speed}")

    def _save(self) -> None:
        if self.path is None:
            return
        self._check_weights()
        state = {
            "epoch": self.epoch,
            "batches_done": self.batches_done,
            "step": self.step,
            "sum": float(self.sum),
            "log": self.log,
            "network": self.task.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "task": self.task.state(),
            "rng": torch.get_rng_state(),
            "arithmetic": arithmetic.used(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        if ranks.place().rank == 0:
            checkpoint.save(self.path, state)

    def _resume(self) -> None:
        state = checkpoint.load(self.path) if self.path is not None else None
        if state is None:
            return
        self.epoch, self.batches_done, self.step = state["epoch"], state["batches_done"], state["step"]
        self.sum.fill_(state["sum"])
        self.log = state["log"]
        self.task.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.task.restore(state["task"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        print(f"{self.label}: resumes from epoch {self.epoch + 1}, step {self.step}", flush=True)
        before, now = state["arithmetic"], describe(self.device, uses_bf16(self.device, self.settings.precision))
        arithmetic.note(before)
        if now not in before:
            print(f"note: {self.label}: goes on in {now}, after steps in {'; '.join(before)}", flush=True)
