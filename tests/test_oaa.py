"""Online attention accumulation and the attention drop layer against plain numpy and hand-worked cases."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.config.schema import Accumulate
from pipeline.data.geometry import Window
from pipeline.data.index import Image
from pipeline.methods.oaa import AttentionAccumulator, attention, passes
from pipeline.stores.raster import RasterStore
from pipeline.training import checkpoint
from tests.marks import needs_cuda

K = 4
GRID = (4, 6)  # of every image here: 40 x 60 pixels, 4 cells on the short side
TAGS = [(1,), (2, 4), (3,), (1, 3, 4), (2,)]
IMAGES = [Image(f"img{n}", Path(), 40, 60, tags, None, None) for n, tags in enumerate(TAGS)]
WHOLE = Window()
ALL = Accumulate(gate="none", skip_epochs=0, cells=4)


def tag_row(image: Image) -> list[float]:
    return [float(class_id in image.tags) for class_id in range(1, K + 1)]


def accumulator(settings: Accumulate = ALL, epochs: int = 10, **more: Any) -> AttentionAccumulator:
    return AttentionAccumulator(IMAGES, settings, epochs, **more)


def feed(
    into: AttentionAccumulator,
    maps: Any,
    image: int = 0,
    epoch: int = 0,
    logits: Sequence[float] = (0.0,) * K,
    window: Window = WHOLE,
) -> int:
    """One image's raw maps: K x h x w, or one h x w map for all classes."""
    values = torch.as_tensor(np.asarray(maps, np.float32))
    values = values.expand(K, *values.shape) if values.dim() == 2 else values
    tags = torch.tensor([tag_row(IMAGES[image])])
    return into.update(values[None], torch.tensor([logits]), tags, [IMAGES[image].id], [window], epoch)


def dumped(source: AttentionAccumulator, folder: Path) -> RasterStore:
    source.dump(folder / "maps.h5")
    return RasterStore(folder / "maps.h5")


class TestAttention:
    def test_it_is_relu_over_maximum(self) -> None:
        """OAA Eq. 2, each map by its own maximum."""
        maps = np.array([[[1.0, -3.0], [2.0, 4.0]], [[0.5, 0.25], [-1.0, 0.0]]], np.float32)
        expected = [[[0.25, 0.0], [0.5, 1.0]], [[1.0, 0.5], [0.0, 0.0]]]
        assert attention(maps).tolist() == expected
        assert maps.min() == -3  # what was handed in stays as it was

    def test_a_map_without_a_positive_value_is_zero(self) -> None:
        assert not attention(np.array([[[-1.0, -2.0]], [[0.0, 0.0]]], np.float32)).any()

    @pytest.mark.parametrize(
        "kind", ["bfloat16", "channels_last", "requires_grad", pytest.param("cuda", marks=needs_cuda)]
    )
    def test_maps_of_any_kind_are_fused_alike(self, kind: str) -> None:
        """As networks hand them out; the values are exact in bfloat16."""
        plain = torch.randn(len(IMAGES), K, *GRID, generator=torch.Generator().manual_seed(0)).bfloat16().float()
        maps = {
            "bfloat16": plain.bfloat16(),
            "channels_last": plain.contiguous(memory_format=torch.channels_last),
            "requires_grad": plain.clone().requires_grad_(),
            "cuda": plain.to("cuda" if torch.cuda.is_available() else "cpu"),
        }[kind]
        found = [accumulator(Accumulate(gate="top_n", skip_epochs=0, cells=4)) for _ in range(2)]
        tags = torch.tensor([tag_row(image) for image in IMAGES])
        for into, given in zip(found, (plain, maps), strict=True):
            logits = given.float().amax((2, 3))
            into.update(given, logits, tags, [image.id for image in IMAGES], [WHOLE] * 5, 0)
        assert found[0]._seen.any()
        assert np.array_equal(found[0]._values, found[1]._values)


class TestGates:
    """Scores of classes 1..4; the brackets say which tagged classes pass."""

    @pytest.mark.parametrize(
        ("gate", "logits", "tags", "expected"),
        [
            ("top_n", [3, 2, 1, 0], [1], [1]),
            ("top_n", [3, 2, 1, 0], [2], []),
            ("top_n", [3, 2, 1, 0], [1, 2], [1, 2]),
            ("top_n", [3, 2, 1, 0], [1, 3], [1]),
            ("top_n", [3, 2, 1, 0], [2, 3], [2]),  # ranks among the two highest although class 1 is above it
            ("top_n", [3, 2, 1, 0], [3, 4], []),
            ("top_n", [-5, -4, -3, -2], [4], [4]),  # ranks, not signs
            ("top_n", [1, 1, 1, 1], [2], []),  # of equal scores the lower class ranks first
            ("top_n", [1, 1, 1, 1], [1], [1]),
            ("top_n", [1, 1, 1, 1], [1, 4], [1]),
            ("top_n", [0, 0, 0, 0], [1, 2, 3, 4], [1, 2, 3, 4]),
            ("strict", [3, 2, 1, 0], [1], [1]),
            ("strict", [3, 2, 1, 0], [2, 3], []),  # class 1 is no target and above them
            ("strict", [3, 2, 1, 0], [1, 2], [1, 2]),
            ("strict", [3, 2, 1, 0], [1, 3], [1]),
            ("strict", [1, 1, 0, 0], [1], []),  # as high as a non-target is not above it
            ("strict", [-3, -2, -1, -9], [1, 2, 3, 4], [1, 2, 3, 4]),  # there is no non-target
            ("none", [0, 9, 9, 9], [1], [1]),
            ("none", [0, 9, 9, 9], [], []),
            ("top_n", [0, 9, 9, 9], [], []),
            ("strict", [0, 9, 9, 9], [], []),
        ],
    )
    def test_hand_cases(self, gate: str, logits: list[float], tags: list[int], expected: list[int]) -> None:
        row = torch.tensor([[float(class_id in tags) for class_id in range(1, K + 1)]])
        found = passes(torch.tensor([logits], dtype=torch.float32), row, gate)
        assert [class_id for class_id in range(1, K + 1) if found[0, class_id - 1]] == expected

    def test_samples_are_judged_one_by_one(self) -> None:
        logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
        tags = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0]])
        for gate in ("top_n", "strict"):
            assert passes(logits, tags, gate)[:, 0].tolist() == [True, False]


class TestFusion:
    def random_epochs(self, epochs: int) -> list[list[NDArray[np.float32]]]:
        random = np.random.default_rng(1)
        return [[random.normal(0, 1, (K, *GRID)).astype(np.float32) for _ in IMAGES] for _ in range(epochs)]

    def levels(self, maps: NDArray[np.float32]) -> NDArray[np.float64]:
        """Eq. 2 in float64, in levels of 255."""
        positive = np.maximum(maps.astype(np.float64), 0)
        values: NDArray[np.float64] = 255 * positive / positive.max((-2, -1), keepdims=True)
        return values

    def test_max_is_numpys(self, tmp_path: Path) -> None:
        """OAA Eq. 5; what is stored is the nearest level."""
        epochs = self.random_epochs(5)
        found = accumulator()
        for epoch, maps in enumerate(epochs):
            for number, values in enumerate(maps):
                assert feed(found, values, number, epoch) == len(IMAGES[number].tags)
        store = dumped(found, tmp_path)
        for number, image in enumerate(IMAGES):
            expected = np.max([self.levels(maps[number]) for maps in epochs], axis=0)
            assert store.classes(image.id) == list(image.tags)
            for tag in image.tags:
                assert np.abs(store.get(image.id, tag) - expected[tag - 1]).max() <= 0.5 + 1e-4

    def test_average_is_numpys(self, tmp_path: Path) -> None:
        """OAA Eq. 10: M_t = ((t - 1) M_(t-1) + A_t) / t, no level lost before the dump."""
        epochs = self.random_epochs(7)
        found = accumulator(Accumulate(fusion="average", gate="none", skip_epochs=0, cells=4))
        for epoch, maps in enumerate(epochs):
            for number, values in enumerate(maps):
                feed(found, values, number, epoch)
        store = dumped(found, tmp_path)
        for number, image in enumerate(IMAGES):
            mean = np.zeros((K, *GRID))
            for t, maps in enumerate(epochs, 1):
                mean = ((t - 1) * mean + self.levels(maps[number])) / t
            for tag in image.tags:
                assert np.abs(store.get(image.id, tag) - mean[tag - 1]).max() <= 0.5 + 1e-3
        assert found.mean_attention() == pytest.approx(
            np.mean([store.get(image.id, tag).mean() for image in IMAGES for tag in image.tags]) / 255, abs=1e-3
        )

    def test_levels_round_half_to_even(self, tmp_path: Path) -> None:
        halves = np.arange(255) + 0.5
        values = (halves / 255).astype(np.float32)
        exact = np.flatnonzero(values * np.float32(255) == halves)[:22]
        assert {level % 2 for level in exact.tolist()} == {0, 1}
        maps = np.ones(24, np.float32)
        maps[:22] = values[exact]
        found = accumulator()
        feed(found, maps.reshape(GRID))
        expected = [level + level % 2 for level in exact.tolist()] + [255, 255]
        assert dumped(found, tmp_path).get("img0", 1).reshape(-1).tolist() == expected

    def test_classes_of_an_image_do_not_mix(self, tmp_path: Path) -> None:
        found = accumulator()
        maps = np.zeros((K, *GRID))
        for class_index in range(K):
            maps[class_index, class_index, class_index] = 7
        feed(found, maps, 3)
        store = dumped(found, tmp_path)
        for tag in (1, 3, 4):
            assert np.argwhere(store.get("img3", tag) == 255).tolist() == [[tag - 1, tag - 1]]

    @pytest.mark.parametrize("fusion", ["max", "average"])
    def test_batches_and_order_change_no_byte(self, tmp_path: Path, fusion: Any) -> None:
        epochs = self.random_epochs(3)
        logits = torch.randn(3, len(IMAGES), K, generator=torch.Generator().manual_seed(2))
        files = []
        for batch_size, seed in [(1, 0), (2, 1), (3, 2), (5, 3)]:
            found = accumulator(Accumulate(fusion, "top_n", 0, cells=4), epochs=3)
            for epoch, maps in enumerate(epochs):
                order = np.random.default_rng([seed, epoch]).permutation(len(IMAGES)).tolist()
                for start in range(0, len(order), batch_size):
                    part = order[start : start + batch_size]
                    found.update(
                        torch.from_numpy(np.stack([maps[n] for n in part])),
                        logits[epoch, part],
                        torch.tensor([tag_row(IMAGES[n]) for n in part]),
                        [IMAGES[n].id for n in part],
                        [WHOLE] * len(part),
                        epoch,
                    )
            path = tmp_path / f"{batch_size}.h5"
            found.dump(path)
            files.append(path.read_bytes())
        assert len(set(files)) == 1

    def test_a_flip_is_undone(self, tmp_path: Path) -> None:
        maps = np.random.default_rng(0).random(GRID)
        maps[2, 1] = 1
        straight, flipped = accumulator(), accumulator()
        feed(straight, maps)
        feed(flipped, maps[:, ::-1].copy(), window=Window(flip=True))
        difference = straight._values.astype(int) - flipped._values
        assert np.abs(difference).max() <= 1
        assert straight._values.max() == 255

    @pytest.mark.parametrize("fusion", ["max", "average"])
    def test_a_crop_leaves_the_cells_outside_alone(self, tmp_path: Path, fusion: Any) -> None:
        """First the whole image: 102 in all cells but one. Then its right half: level 255. Then nothing, everywhere."""
        found = accumulator(Accumulate(fusion, "none", 0, cells=4), keep_last=True)
        first = np.full(GRID, 0.4)
        first[0, 0] = 1.0
        feed(found, first)
        feed(found, np.ones((8, 8)), epoch=1, window=Window(0, 0.5, 1, 1))
        expected = np.full(GRID, 102)
        expected[0, 0] = 255
        expected[:, 3:] = 255 if fusion == "max" else np.rint((102 + 255) / 2)
        assert dumped(found, tmp_path).get("img0", 1).tolist() == expected.tolist()
        last = found.last("img0", 1)
        assert last is not None
        expected[:, 3:] = 255
        assert last.tolist() == expected.tolist()
        feed(found, np.zeros(GRID), epoch=2)
        if fusion == "average":  # of two maps on the left, of three on the right
            expected = np.rint(np.where(np.arange(6) < 3, np.where(expected == 255, 255, 102) / 2, (102 + 255) / 3))
        assert dumped(found, tmp_path).get("img0", 1).tolist() == expected.tolist()

    def test_grids_keep_the_aspect(self) -> None:
        images = [
            Image(name, Path(), height, width, (1,), None, None)
            for name, height, width in [("wide", 375, 500), ("tall", 500, 334), ("square", 96, 96), ("tiny", 1, 3)]
        ]
        grids = AttentionAccumulator(images, Accumulate(cells=28), 1).grids
        assert grids == {"wide": (28, 37), "tall": (42, 28), "square": (28, 28), "tiny": (28, 84)}

    def test_maps_of_another_size_are_resampled(self, tmp_path: Path) -> None:
        """A map of twice the grid's size, constant over each cell, is that grid."""
        cells = np.random.default_rng(0).random(GRID)
        cells[1, 1] = 1
        found = accumulator()
        feed(found, cells.repeat(2, 0).repeat(2, 1))
        expected = np.rint(cells * 255)
        assert np.abs(dumped(found, tmp_path).get("img0", 1) - expected).max() <= 1


class TestBatches:
    """Batches of several grids, with flips and crops: as one sample after another."""

    MIXED = (
        Image("mixed0", Path(), 40, 60, (1,), None, None),
        Image("mixed1", Path(), 60, 40, (2, 4), None, None),
        Image("mixed2", Path(), 40, 60, (1, 2, 3, 4), None, None),
        Image("mixed3", Path(), 40, 40, (), None, None),
        Image("mixed4", Path(), 40, 60, (3,), None, None),
        Image("mixed5", Path(), 60, 40, (1, 3), None, None),
    )
    WINDOWS = (WHOLE, WHOLE, Window(flip=True), WHOLE, Window(0.25, 0, 1, 0.5, True), Window(0, -0.5, 1, 1))

    def run(self, parts: Sequence[Sequence[int]], fusion: Any, gate: Any, epochs: int = 4) -> AttentionAccumulator:
        """``parts``: the images of each batch of an epoch; all maps are 4 x 6, as wide images' grids are."""
        found = AttentionAccumulator(self.MIXED, Accumulate(fusion, gate, 0, cells=4), epochs, keep_last=True)
        tags = torch.tensor([tag_row(image) for image in self.MIXED])
        for epoch in range(epochs):
            draw = torch.Generator().manual_seed(epoch)
            maps, logits = torch.randn(6, K, *GRID, generator=draw), torch.randn(6, K, generator=draw)
            windows = self.WINDOWS[epoch:] + self.WINDOWS[:epoch]
            for part in map(list, parts):
                ids = [self.MIXED[n].id for n in part]
                found.update(maps[part], logits[part], tags[part], ids, [windows[n] for n in part], epoch)
        return found

    @pytest.mark.parametrize("fusion", ["max", "average"])
    @pytest.mark.parametrize("gate", ["none", "strict"])
    def test_a_batch_is_fused_as_its_samples_one_by_one(self, fusion: Any, gate: Any) -> None:
        single = self.run([[n] for n in range(6)], fusion, gate).state()
        assert single["_seen"].all()  # the strict gate leaves some to the last epoch's rule
        assert single["_has_last"].all() == (gate == "none")
        for parts in ([range(6)], [[5, 0, 2], [4, 1, 3]], [[3], [2, 4, 5, 1, 0]]):
            batched = self.run(parts, fusion, gate).state()
            assert all(torch.equal(single[name], batched[name]) for name in single)

    @pytest.mark.parametrize("fusion", ["max", "average"])
    def test_an_image_twice_in_a_batch_counts_twice(self, fusion: Any) -> None:
        twice = self.run([[0, 1, 0, 4, 4, 2, 0]], fusion, "none").state()
        single = self.run([[n] for n in (0, 1, 0, 4, 4, 2, 0)], fusion, "none").state()
        assert all(torch.equal(single[name], twice[name]) for name in single)
        if fusion == "average":
            assert twice["_counts"].max() == 3 * 4  # image 0, in four epochs

    def test_a_dump_of_several_grids_is_in_the_images_order(self, tmp_path: Path) -> None:
        found = AttentionAccumulator(self.MIXED, ALL, 9)
        shades = {}
        for number, image in enumerate(self.MIXED):
            for tag in image.tags if number != 2 else (2, 3):  # tags 1 and 4 of image 2 are never seen
                shades[image.id, tag] = 40 * number + tag
                maps = torch.full((1, K, *found.grids[image.id]), shades[image.id, tag] / 255)
                maps[:, :, 0, 0] = 1
                found.update(maps, torch.zeros(1, K), torch.eye(K)[[tag - 1]], [image.id], [WHOLE], 0)
        store = dumped(found, tmp_path)
        assert list(store) == [image.id for image in self.MIXED]
        assert [store.classes(name) for name in store] == [[1], [2, 4], [2, 3], [], [3], [1, 3]]
        assert len(store) == len(shades) == 8
        for (name, tag), shade in shades.items():
            values = store.get(name, tag)
            assert values.shape == found.grids[name]
            assert values[0, 0] == 255
            assert (values.reshape(-1)[1:] == shade).all()
        assert found.share_seen() == 8 / 10


class TestWhen:
    PEAK = np.eye(4, 6)

    def test_first_epochs_are_skipped(self) -> None:
        found = accumulator(Accumulate(gate="none", skip_epochs=2, cells=4))
        assert [feed(found, self.PEAK, epoch=epoch) for epoch in range(4)] == [0, 0, 1, 1]

    def test_a_pair_that_never_passed_takes_the_last_epochs_map(self, tmp_path: Path) -> None:
        """Image 1 has tags 2 and 4; only 2 ever passes. Its maps in the last epoch: all of class 2's, 4's for once."""
        found = accumulator(Accumulate(gate="strict", skip_epochs=0, cells=4), epochs=3, keep_last=True)
        scores = [0.0, 5.0, 1.0, -1.0]
        assert feed(found, self.PEAK, 1, 0, scores) == 1
        assert feed(found, self.PEAK, 1, 1, scores) == 1
        assert dumped(found, tmp_path).classes("img1") == [2]
        last_epoch = self.PEAK[::-1].copy()
        assert feed(found, last_epoch, 1, 2, scores) == 2
        store = dumped(found, tmp_path)
        assert store.get("img1", 2).tolist() == (255 * np.maximum(self.PEAK, last_epoch)).tolist()
        assert store.get("img1", 4).tolist() == (255 * last_epoch).tolist()
        assert found.last("img1", 4) is None  # it did not pass
        assert found.last("img1", 2) is not None
        assert found.share_seen() == 2 / 8

    def test_what_once_passed_is_not_topped_up_in_the_last_epoch(self) -> None:
        found = accumulator(Accumulate(gate="strict", skip_epochs=0, cells=4), epochs=2)
        assert feed(found, self.PEAK, 0, 0, [5.0, 0, 0, 0]) == 1
        assert feed(found, np.ones(GRID), 0, 1, [-5.0, 0, 0, 0]) == 0
        assert found.mean_attention() == pytest.approx(4 / (8 * 24))  # four cells of 255, eight pairs of 24 cells


class TestStore:
    def test_dump_names_all_images_and_leaves_out_what_was_never_seen(self, tmp_path: Path) -> None:
        found = accumulator()
        feed(found, np.eye(4, 6), 2)
        store = dumped(found, tmp_path)
        assert store.kind == "attention"
        assert list(store) == [image.id for image in IMAGES]
        assert [store.classes(image.id) for image in IMAGES] == [[], [], [3], [], []]
        assert store.get("img2", 3).tolist() == (255 * np.eye(4, 6)).tolist()

    @pytest.mark.parametrize("fusion", ["max", "average"])
    def test_restored_it_goes_on_as_if_never_stopped(self, tmp_path: Path, fusion: Any) -> None:
        settings = Accumulate(fusion, "top_n", 0, cells=4)
        random = np.random.default_rng(3)
        rounds = [
            (random.normal(0, 1, (K, *GRID)), number, epoch, random.normal(0, 1, K).tolist())
            for epoch in range(4)
            for number in range(len(IMAGES))
        ]
        whole = accumulator(settings, 4, keep_last=True)
        for item in rounds:
            feed(whole, *item)
        first, second = (accumulator(settings, 4, keep_last=True) for _ in range(2))
        for item in rounds[:12]:
            feed(first, *item)
        checkpoint.save(tmp_path / "state", first.state())
        feed(first, np.ones(GRID), 0, 3)  # what comes after the checkpoint is not in it
        state = checkpoint.load(tmp_path / "state")
        assert state is not None
        second.restore(state)
        for item in rounds[12:]:
            feed(second, *item)
        one, other = whole.state(), second.state()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        whole.dump(tmp_path / "whole.h5")
        second.dump(tmp_path / "second.h5")
        assert (tmp_path / "whole.h5").read_bytes() == (tmp_path / "second.h5").read_bytes()
        assert np.count_nonzero(whole._seen) >= 6
        assert whole._has_last.any()
