"""A training that is stopped anywhere and started again ends as if it had never been stopped, to the bit."""

import subprocess
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import arithmetic
from pipeline.config.schema import Accumulate, AttentionDrop, Augmentation, Backbone, Classifier, Training
from pipeline.data.index import Index
from pipeline.data.loading import Batch, TrainingSet
from pipeline.errors import PipelineError
from pipeline.methods.base import Method, Output
from pipeline.runtime import Runtime
from pipeline.training.loop import Loop, extent
from pipeline.training.settings import prepare
from pipeline.workflow.graph import Job
from pipeline.workflow.stage import Work
from stages.classifier import ClassifierTask, join_snapshots
from tests.marks import needs_cuda
from tests.voc_tree import make_index

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index(make_index(tmp_path_factory.mktemp("tree"), train=9))


class DropoutMethod(Method):
    """A small classifier that draws from the global generator and keeps batch statistics."""

    map_name = "Dropout"

    def __init__(self, settings: Classifier, num_classes: int) -> None:
        super().__init__(settings, num_classes)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.4))
        self.classifier = nn.Conv2d(8, num_classes, 1)

    def new_layers(self) -> Iterable[nn.Module]:
        return [self.classifier]

    def layers(self) -> dict[str, list[nn.Module]]:
        return {"all": [self.features]}

    def describe(self) -> str:
        return self.map_name

    def forward(self, images: Tensor, occluded: Tensor | None = None) -> Output:
        maps = self.classifier(self.features(images))
        return Output(maps.float().mean((2, 3)), maps)


class Stop(Exception):
    """Where a kill would have come."""


class StoppingTask(ClassifierTask):
    """The classifier stage's task, which stops before loss number ``at`` of this process, or at an epoch's end."""

    at: int | None = None
    at_epoch: int | None = None

    def loss(self, batch: Batch, epoch: int) -> Tensor:
        if self.at is not None:
            if self.at == 0:
                raise Stop
            self.at -= 1
        return super().loss(batch, epoch)

    def end_epoch(self, epoch: int) -> dict[str, float]:
        found = super().end_epoch(epoch)
        if epoch == self.at_epoch:
            raise Stop
        return found


TRAINING = Training(2, 0.1, epochs=3, accumulation=2, lr_new=3.0)  # 5 batches, the last of 1 image; 3 steps an epoch
SETTINGS = Classifier(
    Backbone("small"),
    TRAINING,
    augmentation=Augmentation(crop=20, jitter=(0.2, 0.2, 0.2, 0.1)),
    accumulate=Accumulate(cells=6, skip_epochs=1, snapshots=True),
    attention_drop=AttentionDrop(beta=0.7, delta=0.3),
)


class Run:
    """A training that is stopped and started again in one folder."""

    def __init__(self, index: Index, folder: Path, settings: Classifier = SETTINGS, device: torch.device = CPU) -> None:
        self.index, self.folder, self.settings, self.device = index, folder, settings, device
        folder.mkdir()

    def start(self, seed: int, at: int | None = None, at_epoch: int | None = None, every: float = 0.0) -> Any:
        """Run until the stop, or to the end: weights, accumulator and log."""
        torch.manual_seed(seed)
        outputs = {name: self.folder / f"{name}.h5" for name in ("maps", "snapshots")}
        work = Work(Job("classifier", "x", {}, outputs, {}, self.settings), {}, outputs, Runtime(), "", self.checkpoint)
        images = self.index.images("train")
        epochs = extent(self.settings.training, len(images)).epochs
        task = StoppingTask(DropoutMethod(self.settings, 3), images, epochs, 0, work)
        task.at, task.at_epoch = at, at_epoch
        self.task = task
        data = TrainingSet(images, 3, self.settings.augmentation, 0)
        runtime = Runtime(checkpoint_every=every)
        made = Loop(task, data, self.settings.training, self.device, runtime=runtime, path=self.checkpoint)
        with arithmetic.recording():  # as in a process of its own
            log = made.run()
        return task.network.state_dict(), task.accumulator.state(), log

    @property
    def checkpoint(self) -> Path:
        return self.folder / ".checkpoint"

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.glob(".checkpoint-*")}


def assert_same(one: Any, other: Any) -> None:
    """Weights and accumulators to the bit, logs to the digit."""
    for mine, theirs in zip(one[:2], other[:2], strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert torch.equal(mine[key], theirs[key]), key
    assert one[2] == other[2]


@pytest.fixture(scope="module")
def unbroken(index: Index, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, bytes]]:
    run = Run(index, tmp_path_factory.mktemp("unbroken") / "run")
    return run.start(seed=0, every=1e9), run.files()


class TestResume:
    """In spirit of a kill: an exception at a chosen loss, then a new process's start in the same folder."""

    def test_the_example_is_worth_it(self, index: Index, tmp_path: Path, unbroken: Any) -> None:
        """Dropout, shuffling, the drop layer and the accumulator all play a part."""
        (weights, accumulator, log), files = unbroken
        assert accumulator["_seen"].sum() > 5
        assert accumulator["_has_last"].any()
        assert len(log["epochs"]) == 3
        assert sorted(files) == [f".checkpoint-epoch-00{epoch}.h5" for epoch in range(3)]
        other = Run(index, tmp_path / "other").start(seed=1, every=1e9)
        assert not torch.equal(other[0]["classifier.weight"], weights["classifier.weight"])

    @pytest.mark.parametrize("at", range(2, 15))
    def test_stopped_before_any_loss(self, index: Index, tmp_path: Path, unbroken: Any, at: int) -> None:
        run = Run(index, tmp_path / "run")
        with pytest.raises(Stop):
            run.start(seed=0, at=at)
        assert run.checkpoint.exists()
        assert_same(run.start(seed=99), unbroken[0])  # the generator's state is the checkpoint's, not the seed's
        assert run.files() == unbroken[1]

    def test_stopped_again_and_again(self, index: Index, tmp_path: Path, unbroken: Any) -> None:
        run = Run(index, tmp_path / "run")
        for at in (1, 3, 4, 2, 3, 4):
            with pytest.raises(Stop):
                run.start(seed=0, at=at)
        assert_same(run.start(seed=0), unbroken[0])
        assert run.files() == unbroken[1]

    @pytest.mark.parametrize("epoch", [0, 1, 2])
    def test_stopped_between_an_epochs_maps_and_its_checkpoint(
        self, index: Index, tmp_path: Path, unbroken: Any, epoch: int
    ) -> None:
        run = Run(index, tmp_path / "run")
        with pytest.raises(Stop):
            run.start(seed=0, at_epoch=epoch)
        assert_same(run.start(seed=0), unbroken[0])
        assert run.files() == unbroken[1]

    def test_stopped_after_the_end(self, index: Index, tmp_path: Path, unbroken: Any) -> None:
        run = Run(index, tmp_path / "run")
        run.start(seed=0)
        assert_same(run.start(seed=0, at=0), unbroken[0])

    def test_a_checkpoint_of_long_ago_serves(self, index: Index, tmp_path: Path, unbroken: Any) -> None:
        """Stopped at loss 12, with the checkpoint that lay there after step 2."""
        run = Run(index, tmp_path / "run")
        with pytest.raises(Stop):
            run.start(seed=0, at=5)
        early = run.checkpoint.read_bytes()
        with pytest.raises(Stop):
            run.start(seed=0, at=7)
        run.checkpoint.write_bytes(early)
        assert_same(run.start(seed=0), unbroken[0])
        assert run.files() == unbroken[1]

    def test_without_a_checkpoint_it_starts_over(self, index: Index, tmp_path: Path, unbroken: Any) -> None:
        run = Run(index, tmp_path / "run")
        with pytest.raises(Stop):
            run.start(seed=0, at=8, every=1e9)
        assert not run.checkpoint.exists()
        assert_same(run.start(seed=0), unbroken[0])

    @pytest.mark.parametrize(
        "changes",
        [
            {"optimizer": "adam", "lr": 0.01},
            {"epochs": None, "iterations": 7},
            {"schedule": "poly", "warmup": 4, "nesterov": True, "precision": "bf16"},
        ],
    )
    def test_other_settings(self, index: Index, tmp_path: Path, changes: dict[str, Any]) -> None:
        settings = replace(SETTINGS, training=replace(TRAINING, **changes))
        whole = Run(index, tmp_path / "whole", settings)
        expected = whole.start(seed=0, every=1e9)
        run = Run(index, tmp_path / "run", settings)
        for at in (4, 5):
            with pytest.raises(Stop):
                run.start(seed=0, at=at)
        assert_same(run.start(seed=0), expected)
        assert run.files() == whole.files()

    def test_a_flipped_bit_is_refused_with_both_hashes(self, index: Index, tmp_path: Path) -> None:
        run = Run(index, tmp_path / "run")
        with pytest.raises(Stop):
            run.start(seed=0, at=6)
        content = bytearray(run.checkpoint.read_bytes())
        saved = content[:64].decode()
        content[len(content) // 2] ^= 4
        run.checkpoint.write_bytes(content)
        with pytest.raises(PipelineError) as caught:
            run.start(seed=0)
        (line,) = caught.value.lines
        found = line.split("sha256 is ")[1][:64]
        assert line == (f"{run.checkpoint}: damaged: sha256 is {found}, expected {saved}; delete it to start over")
        assert found != saved
        assert int(found, 16)

    @pytest.mark.parametrize("at", [12, None])
    @pytest.mark.parametrize("harm", ["flip", "cut", "missing"])
    def test_a_damaged_snapshot_is_refused_until_the_training_starts_over(
        self, index: Index, tmp_path: Path, unbroken: Any, harm: str, at: int | None
    ) -> None:
        """In the midst of the training, and after its end, when the snapshots are about to be merged."""
        run = Run(index, tmp_path / "run")
        with pytest.raises(Stop) if at else nullcontext():
            run.start(seed=0, at=at)
        path = run.folder / ".checkpoint-epoch-001.h5"
        content = bytearray(path.read_bytes())
        content[content.index(b"image_ids") - 1] ^= 1
        path.write_bytes({"flip": content, "cut": content[:-1], "missing": b""}[harm])
        if harm == "missing":
            path.unlink()
        for _ in range(2):
            with pytest.raises(PipelineError) as caught:
                run.start(seed=0)
            assert caught.value.lines == (
                f"{path}: {'missing' if harm == 'missing' else 'damaged'}: the maps after epoch 2 of an interrupted "
                f"training; to train again from its start: rm {run.checkpoint}*",
            )
        subprocess.run(caught.value.lines[0].split("start: ")[1], shell=True, check=True)
        assert_same(run.start(seed=0), unbroken[0])
        assert run.files() == unbroken[1]

    def test_a_snapshot_damaged_before_the_merge_is_refused(self, index: Index, tmp_path: Path) -> None:
        run = Run(index, tmp_path / "run")
        run.start(seed=0)
        path = run.folder / ".checkpoint-epoch-002.h5"
        path.write_bytes(path.read_bytes()[::-1])
        with pytest.raises(PipelineError, match=r"epoch-002\.h5: damaged"):
            join_snapshots(run.task.work, run.task)


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    """The device in deterministic mode, for one test."""
    threads = torch.get_num_threads()
    yield prepare("cuda", 1, deterministic=True)
    prepare("cuda", threads)


class TestCuda:
    pytestmark = needs_cuda

    def test_it_trains_in_bf16(self, index: Index, tmp_path: Path, cuda: torch.device) -> None:
        training = replace(TRAINING, epochs=12, precision="bf16", batch_size=9, accumulation=1)
        settings = replace(SETTINGS, training=training, attention_drop=None)
        weights, _, log = Run(index, tmp_path / "run", settings, cuda).start(seed=0)
        assert weights["classifier.weight"].is_cuda
        assert weights["classifier.weight"].dtype == torch.float32
        assert log["epochs"][-1]["loss"] < log["epochs"][0]["loss"]

    @pytest.mark.parametrize("at", [3, 6, 11])
    def test_stopped_it_ends_the_same(self, index: Index, tmp_path: Path, cuda: torch.device, at: int) -> None:
        settings = replace(SETTINGS, training=replace(TRAINING, precision="bf16"))
        whole = Run(index, tmp_path / "whole", settings, cuda)
        expected = whole.start(seed=0, every=1e9)
        run = Run(index, tmp_path / "run", settings, cuda)
        with pytest.raises(Stop):
            run.start(seed=0, at=at)
        assert_same(run.start(seed=99), expected)
        assert run.files() == whole.files()
