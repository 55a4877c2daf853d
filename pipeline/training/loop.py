"""The one training loop: a task gives the network and its loss, the loop does the rest.

Killed at any moment and started again it goes on from the last checkpoint and, on a CPU or a GPU in deterministic mode,
ends with the bytes of an unbroken run: what is drawn at random depends on seed, epoch and image alone, the order of the
batches on seed and epoch, and the generators' states (dropout) are part of the checkpoint.
"""

import math
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pipeline import interrupts
from pipeline.config.schema import Training
from pipeline.data.loader import load, loading_plan
from pipeline.data.loading import Batch, TrainingSet
from pipeline.errors import PipelineError
from pipeline.runtime import Runtime
from pipeline.training import checkpoint
from pipeline.training.settings import autocast, build_optimizer, learning_rate, parameter_groups

LOGGED = 20  # points an epoch on the loss curve, at most


class Task(Protocol):
    """What is trained."""

    @property
    def network(self) -> nn.Module: ...

    def about(self) -> dict[str, str]:
        """What the report shows of the network: a description as 'text', and more where ``pipeline.report`` asks."""

    def new_layers(self) -> Iterable[nn.Module]:
        """The layers added to the backbone: they learn at ``lr_new`` times the rate."""

    def loss(self, batch: Batch, epoch: int) -> Tensor:
        """The scalar loss of a batch that lies on the device."""

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Called once after each epoch; what it returns is logged."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside network and optimizer."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` gave."""


class Stateless:
    """The rest of a task that keeps nothing from one batch to the next."""

    def end_epoch(self, epoch: int) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


class Extent(NamedTuple):
    """How long a training is."""

    batches: int  # an epoch
    steps_per_epoch: int  # optimizer steps
    steps: int  # in all
    epochs: int  # begun


def extent(settings: Training, images: int) -> Extent:
    """The extent of a training on ``images`` images."""
    batches = -(-images // settings.batch_size)
    steps_per_epoch = -(-batches // settings.accumulation)
    steps = settings.iterations or (settings.epochs or 0) * steps_per_epoch
    return Extent(batches, steps_per_epoch, steps, -(-steps // steps_per_epoch))


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
        self.plan = loading_plan(dataset, settings.batch_size, runtime.workers, label)
        self.batches, self.steps_per_epoch, self.steps, self.epochs = extent(settings, len(dataset))
        task.network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        groups = parameter_groups(task.network, task.new_layers(), settings)
        self.optimizer = build_optimizer(groups, settings)
        self.epoch = self.first = self.step = 0  # first: batches of this epoch that are done
        self.log: dict[str, list[dict[str, float]]] = {"steps": [], "epochs": []}
        self.sum = torch.zeros((), dtype=torch.float64, device=device)  # of this epoch's losses

    def run(self) -> dict[str, Any]:
        """Train to the end.

        Asked to stop (``pipeline.interrupts``) it finishes the optimizer step at work and saves its state.

        Raises:
            PipelineError: the loss is not finite, or the loader stopped delivering.
            Stopped: as asked; the checkpoint holds every completed step.
        """
        with interrupts.deferred():
            self._resume()
            self.task.network.train()
            saved, kept = time.monotonic(), self.step
            while self.step < self.steps:
                batches = load(self.dataset, self.settings.batch_size, self.epoch, self.first, self.plan)
                with closing(batches):
                    for batch in batches:
                        self.first += 1
                        ends = self.first == self.batches
                        stepped = self._train(batch, ends or self.first % self.settings.accumulation == 0)
                        if ends or self.step == self.steps:
                            self._end_epoch()
                        if stepped and (interrupts.requested() or time.monotonic() - saved >= self.every):
                            self._save()
                            self._stop_if_asked()
                            saved, kept = time.monotonic(), self.step
                        if self.first == 0:
                            break
            if self.step > kept:  # what follows, writing the maps of many images say, may be stopped, too
                self._save()
        return self.log

    def _stop_if_asked(self) -> None:
        if interrupts.requested():
            interrupts.say(f"{self.label}: state saved at epoch {self.epoch + 1}, step {self.step}")
            interrupts.check()

    def _train(self, batch: Batch, update: bool) -> bool:
        """One batch; with ``update`` also the optimizer's step over what has gathered. Returns ``update``."""
        with autocast(self.device, self.settings.precision):
            loss = self.task.loss(batch.to(self.device), self.epoch)
        (loss / self._gathered()).backward()  # type: ignore[no-untyped-call]
        self.sum += loss.detach().double()
        if not update:
            return False
        rate = learning_rate(self.settings, self.step, self.steps_per_epoch, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["multiplier"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.step % max(1, self.steps_per_epoch // LOGGED) == 0:
            value = self._finite(float(loss.detach()), self.step)
            self.log["steps"].append({"step": self.step, "epoch": self.epoch, "loss": round(value, 6), "lr": rate})
        self.step += 1
        return True

    def _gathered(self) -> int:
        """The batches of which this one's optimizer step is the mean; an epoch's last step may have fewer of them."""
        whole = self.settings.accumulation
        start = (self.first - 1) // whole * whole
        return min(whole, self.batches - start)

    def _finite(self, loss: float, step: int) -> float:
        if not math.isfinite(loss):
            raise PipelineError(f"{self.label}: the loss is {loss} at step {step}; lower training.lr")
        return loss

    def _end_epoch(self) -> None:
        mean = self._finite(float(self.sum) / self.first, self.step - 1)
        entry = {"epoch": self.epoch, "loss": round(mean, 6), **self.task.end_epoch(self.epoch)}
        self.log["epochs"].append(entry)
        self.sum.zero_()
        self.epoch += 1
        self.first = 0
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in entry.items() if key != "epoch")
        interrupts.say(f"{self.label}: epoch {self.epoch}/{self.epochs}: {numbers}")

    def _save(self) -> None:
        if self.path is None:
            return
        state = {
            "epoch": self.epoch,
            "first": self.first,
            "step": self.step,
            "sum": float(self.sum),
            "log": self.log,
            "network": self.task.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "task": self.task.state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        checkpoint.save(self.path, state)

    def _resume(self) -> None:
        state = checkpoint.load(self.path) if self.path is not None else None
        if state is None:
            return
        self.epoch, self.first, self.step = state["epoch"], state["first"], state["step"]
        self.sum.fill_(state["sum"])
        self.log = state["log"]
        self.task.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.task.restore(state["task"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        print(f"{self.label}: goes on from epoch {self.epoch + 1}, step {self.step}", flush=True)
