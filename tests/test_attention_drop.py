"""The attention drop layer and the classifier stage's task, on hand-worked masks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.schema import Accumulate, AttentionDrop, Backbone, Classifier, Head, Training
from pipeline.data.geometry import Window
from pipeline.data.loading import Batch
from pipeline.methods.attention_drop import AttentionDropLayer
from pipeline.methods.base import Method, Output
from pipeline.methods.cam import Cam
from pipeline.methods.oaa import AttentionAccumulator
from pipeline.runtime import Runtime
from pipeline.stores.raster import RasterStore
from pipeline.workflow.graph import Job
from pipeline.workflow.stage import Work
from stages.classifier import ClassifierTask
from tests.test_oaa import ALL, GRID, IMAGES, WHOLE, K, accumulator, feed, tag_row


def drop_layer(beta: float, delta: float = 0.6, seed: int = 0) -> tuple[AttentionDropLayer, AttentionAccumulator]:
    kept = accumulator(keep_last=True)
    return AttentionDropLayer(AttentionDrop(beta=beta, delta=delta), kept, seed), kept


def masked(
    layer: AttentionDropLayer, numbers: Sequence[int], windows: Sequence[Window] | None = None, epoch: int = 1
) -> Tensor:
    ids = [IMAGES[number].id for number in numbers]
    tags = torch.tensor([tag_row(IMAGES[number]) for number in numbers])
    return layer.mask(ids, tags, windows or [WHOLE] * len(ids), GRID, epoch, torch.device("cpu"))


class TestDropLayer:
    LEVELS = np.linspace(0, 1, 24).reshape(GRID)

    def test_beta_0_never_occludes(self) -> None:
        layer, kept = drop_layer(0.0, 0.0)
        feed(kept, np.ones(GRID))
        assert not any(masked(layer, [0], epoch=epoch).any() for epoch in range(50))

    def test_beta_1_always_does_once_there_is_a_last_map(self) -> None:
        layer, kept = drop_layer(1.0)
        assert not any(masked(layer, [0], epoch=epoch).any() for epoch in range(10))
        feed(kept, self.LEVELS)
        assert all(masked(layer, [0], epoch=epoch).any() for epoch in range(50))

    @pytest.mark.parametrize("delta", [0.02, 0.35, 0.6, 0.99, 1.0])
    def test_what_is_above_delta_goes(self, delta: float) -> None:
        layer, kept = drop_layer(1.0, delta)
        feed(kept, self.LEVELS)
        stored = np.rint(self.LEVELS * 255) / 255
        assert masked(layer, [0])[0, 0].tolist() == (stored > delta + 1e-6).tolist()

    def test_the_last_map_counts_not_the_cumulative(self) -> None:
        layer, kept = drop_layer(1.0)
        first, second = np.zeros((2, *GRID))
        first[0, 0] = second[3, 5] = 1
        feed(kept, first)
        feed(kept, second, epoch=1)
        assert masked(layer, [0])[0, 0].nonzero().tolist() == [[3, 5]]

    def test_the_last_map_is_the_last_that_passed(self) -> None:
        kept = AttentionAccumulator(IMAGES, Accumulate(gate="strict", skip_epochs=0, cells=4), 10, keep_last=True)
        layer = AttentionDropLayer(AttentionDrop(beta=1.0), kept, 0)
        first, second = np.zeros((2, *GRID))
        first[0, 0] = second[3, 5] = 1
        feed(kept, first, logits=[1.0, 0, 0, 0])
        feed(kept, second, epoch=1, logits=[-1.0, 0, 0, 0])
        assert masked(layer, [0])[0, 0].nonzero().tolist() == [[0, 0]]

    def test_several_tags_occlude_together_and_samples_apart(self) -> None:
        """Images 0 (tag 1), 1 (tags 2, 4) and 4 (tag 2) in one batch: each loses its own cells only."""
        layer, kept = drop_layer(1.0)
        for number, place in [(0, (0, 0)), (1, (1, 1)), (4, (2, 2))]:
            maps = np.zeros((K, *GRID))
            for class_index in range(K):
                maps[class_index, place[0], place[1] + class_index] = 1
            feed(kept, maps, number)
        found = masked(layer, [0, 1, 4])
        assert found.shape == (3, 1, *GRID)
        assert found.dtype == torch.bool
        assert found[0, 0].nonzero().tolist() == [[0, 0]]
        assert found[1, 0].nonzero().tolist() == [[1, 2], [1, 4]]
        assert found[2, 0].nonzero().tolist() == [[2, 3]]

    def test_flips_and_crops_are_redone(self) -> None:
        layer, kept = drop_layer(1.0)
        maps = np.zeros(GRID)
        maps[0, 0] = 1
        feed(kept, maps)
        assert masked(layer, [0], [Window(flip=True)])[0, 0].nonzero().tolist() == [[0, 5]]
        upper_left = Window(0, 0, 0.5, 0.5)
        found = masked(layer, [0], [upper_left])[0, 0]
        assert found[:2, :2].sum() >= 1  # the cell, at twice the size
        assert not found[2:].any()
        assert not masked(layer, [0], [Window(0, 0.5, 1, 1)]).any()

    def test_padding_is_never_occluded(self) -> None:
        layer, kept = drop_layer(1.0, delta=0.0)
        feed(kept, np.ones(GRID))
        found = masked(layer, [0], [Window(0, 0, 2, 1)])[0, 0]
        assert found[:2].all()
        assert not found[2:].any()

    def test_the_draw_depends_on_seed_epoch_and_image_alone(self) -> None:
        layer, kept = drop_layer(0.5)
        other_seed = AttentionDropLayer(AttentionDrop(beta=0.5), kept, 1)
        for number in range(len(IMAGES)):
            feed(kept, np.ones(GRID), number)
        together = torch.stack([masked(layer, range(5), epoch=epoch).flatten(1).any(1) for epoch in range(200)])
        alone = torch.stack(
            [
                torch.stack([masked(layer, [number], epoch=epoch).any() for number in (4, 2, 0, 1, 3)])
                for epoch in range(200)
            ]
        )
        assert torch.equal(alone[:, [2, 3, 1, 4, 0]], together)
        assert 0.4 < together.float().mean() < 0.6
        assert together.float().mean(0).min() > 0.3  # each image, over the epochs
        assert len({tuple(row) for row in together.tolist()}) > 10
        seeded = torch.stack([masked(other_seed, range(5), epoch=epoch).flatten(1).any(1) for epoch in range(200)])
        assert 0.3 < (seeded == together).float().mean() < 0.7


class Recorder(Cam):
    """Keeps what it was given."""

    def forward(self, images: Tensor, occluded: Tensor | None = None) -> Output:
        self.images, self.occluded = images, occluded
        maps = torch.rand(len(images), K, *GRID, requires_grad=True)
        return Output(maps.mean((2, 3)), maps)


def classifier(**settings: Any) -> Classifier:
    return Classifier(
        Backbone("small"), Training(2, 0.1, epochs=4), accumulate=ALL, head=Head(convs=1, channels=8), **settings
    )


def task(block: Classifier, tmp_path: Path, network: type[Method] = Recorder) -> ClassifierTask:
    outputs = {"maps": tmp_path / "maps.h5"}
    job = Job("classifier", "x", {}, outputs, {}, block)
    work = Work(job, {}, outputs, Runtime(), "", tmp_path / ".checkpoint")
    return ClassifierTask(network(block, K), IMAGES, 4, 0, work)


def batch_of(numbers: Sequence[int]) -> Batch:
    images = torch.randn(len(numbers), 3, 40, 60, generator=torch.Generator().manual_seed(0))
    tags = torch.tensor([tag_row(IMAGES[number]) for number in numbers])
    return Batch(images, tags, [IMAGES[number].id for number in numbers], [WHOLE] * len(numbers))


class TestClassifierTask:
    """The stage's wiring: forward, accumulation and occlusion in one step."""

    def test_without_a_drop_layer_the_network_sees_the_batch(self, tmp_path: Path) -> None:
        made = task(classifier(), tmp_path)
        batch = batch_of([0, 1])
        loss = made.loss(batch, 0)
        assert made.accumulator.share_seen() == 0  # nothing is read before the backward pass
        made.end_batch()
        assert isinstance(made.network, Recorder)
        assert made.network.images is batch.images
        assert made.network.occluded is None
        assert loss.requires_grad
        assert made.accumulator.share_seen() == 3 / 8

    def test_occluded_pixels_of_the_image_are_the_mean_colour(self, tmp_path: Path) -> None:
        """0 after normalisation; the batch itself is left as it was."""
        made = task(classifier(attention_drop=AttentionDrop("image", beta=1.0)), tmp_path)
        maps = np.zeros(GRID)
        maps[1, 2] = 1
        feed(made.accumulator, maps, 1)
        batch = batch_of([0, 1])
        before = batch.images.clone()
        made.loss(batch, 1)
        assert isinstance(made.network, Recorder)
        seen = made.network.images
        assert torch.equal(seen[0], before[0])  # image 0 has no last map yet
        assert not seen[1, :, 15, 25].any()  # the cell's centre
        changed = (seen[1] != before[1]).any(0)
        assert torch.equal(seen[1, :, changed], torch.zeros(3, int(changed.sum())))
        rows, columns = (values.tolist() for values in changed.nonzero().T)
        assert 10 <= min(rows) <= max(rows) < 20
        assert 20 <= min(columns) <= max(columns) < 30
        assert torch.equal(batch.images, before)

    def test_features_are_occluded_instead_of_the_image(self, tmp_path: Path) -> None:
        made = task(classifier(attention_drop=AttentionDrop("features", beta=1.0)), tmp_path)
        feed(made.accumulator, np.ones(GRID), 1)
        batch = batch_of([0, 1])
        made.loss(batch, 1)
        assert isinstance(made.network, Recorder)
        assert made.network.images is batch.images
        assert made.network.occluded is not None
        assert made.network.occluded.shape == (2, 1, 40, 60)
        assert made.network.occluded[1].all()
        assert not made.network.occluded[0].any()

    def test_occluded_features_score_the_bias_and_leave_the_others(self) -> None:
        torch.manual_seed(0)
        network = Cam(classifier(), K).eval()
        images = torch.randn(2, 3, 40, 64)
        occluded = torch.zeros(2, 1, 40, 64, dtype=torch.bool)
        occluded[1, :, :16, 8:32] = True  # cells 0..1 x 1..3 at stride 8
        occluded[1, :, 32:35, 56:] = True  # three rows of eight: not half of a cell
        with torch.no_grad():
            plain, without = network(images).maps, network(images, occluded).maps
        assert torch.equal(without[0], plain[0])
        bias = network.head.classifier.bias
        assert bias is not None
        assert torch.equal(without[1, :, :2, 1:4], bias.detach()[:, None, None].expand(K, 2, 3))
        kept = torch.ones(5, 8, dtype=torch.bool)
        kept[:2, 1:4] = False
        torch.testing.assert_close(without[1][:, kept], plain[1][:, kept])
        assert not torch.equal(without[1], plain[1])

    def test_maps_are_fused_as_the_occluded_network_sees_them(self, tmp_path: Path) -> None:
        """OAA Alg. 1: one forward pass serves the loss and the accumulation."""
        made = task(classifier(attention_drop=AttentionDrop("image", beta=1.0)), tmp_path)
        made.loss(batch_of([0, 1, 3]), 0)
        made.end_batch()
        assert made.accumulator.last("img3", 4) is not None
        log = made.end_epoch(0)
        assert log["maps_seen"] == 6 / 8
        assert 0 < log["mean_attention"] < 1
        made.accumulator.dump(tmp_path / "maps.h5")
        assert RasterStore(tmp_path / "maps.h5").classes("img3") == [1, 3, 4]
