"""Localization maps and segmentations of whole images, by networks whose output is known at every pixel."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import schema
from pipeline.config.schema import Crf
from pipeline.config.views import Localization
from pipeline.data.images import read_rgb
from pipeline.data.index import Image
from pipeline.data.loading import normalise
from pipeline.inference import segment
from pipeline.inference.localize import localization_maps
from pipeline.inference.segment import DOUBT, LABELS, segmentations
from pipeline.labels.crf import dense_crf

CPU = torch.device("cpu")
K = 3


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 would hide small errors."""
    monkeypatch.setattr("pipeline.inference.folding.uses_bf16", lambda device, precision: False)
    for module in ("localize", "segment"):
        monkeypatch.setattr(
            f"pipeline.inference.{module}.autocast",
            lambda device, precision: torch.autocast(device.type, torch.bfloat16, enabled=False),
        )


def saved(folder: Path, name: str, rgb: NDArray[np.uint8], tags: tuple[int, ...]) -> Image:
    path = folder / f"{name}.png"
    cv2.imwrite(str(path), rgb[..., ::-1])
    return Image(name, path, rgb.shape[0], rgb.shape[1], tags, None, None)


@pytest.fixture
def images(tmp_path: Path) -> list[Image]:
    return smooth_images(tmp_path)


def smooth_images(folder: Path) -> list[Image]:
    """Write four smooth images of three shapes."""
    made = []
    for number, (height, width, tags) in enumerate(
        [(32, 48, (1, 3)), (48, 32, (2,)), (32, 48, (2, 3)), (30, 50, (1,))]
    ):
        random = np.random.default_rng(number)
        coarse = random.integers(30, 226, (4, 4, 3)).astype(np.uint8)
        rgb = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.uint8)
        made.append(saved(folder, f"image{number}", rgb, tags))
    return made


class Colours(nn.Module):
    """Its class maps are the image's channels at stride 8, the third of them below zero in places."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append((x.shape[2], x.shape[3]))
        return functional.interpolate(
            x, size=(-(-x.shape[2] // 8), -(-x.shape[3] // 8)), mode="bilinear", align_corners=False, antialias=True
        )

    def localize(self, x: Tensor) -> Tensor:
        return self(x).relu()


class Constant(nn.Module):
    """0.4 times the class id, everywhere."""

    def localize(self, x: Tensor) -> Tensor:
        return 0.4 * torch.arange(1.0, K + 1)[None, :, None, None].expand(len(x), K, 5, 7)


def maps_of(network: nn.Module, images: Sequence[Image], **settings: Any) -> dict[tuple[str, int], NDArray[np.uint8]]:
    found = localization_maps(network, images, Localization("classifiers/base", **settings), CPU)
    return {(image_id, tag): values for image_id, tag, values in found}


def plain(image: Image, scale: float = 1.0, flip: bool = False) -> Tensor:
    """K x h x w: the channels of one pass on the stored grid, by the formula; stride 4."""
    x = normalise(read_rgb(image))[None].double()
    size = round(image.height * scale), round(image.width * scale)
    if scale != 1:
        x = functional.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=scale < 1)
    x = x.flip(3) if flip else x
    cells = -(-size[0] // 8), -(-size[1] // 8)
    x = functional.interpolate(x, size=cells, mode="bilinear", align_corners=False, antialias=True).clamp(min=0)
    x = x.flip(3) if flip else x
    grid = -(-image.height // 4), -(-image.width // 4)
    return functional.interpolate(x, size=grid, mode="bilinear", align_corners=False)[0]


def aligned(values: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """h x w resized to H x W, the corners on each other, by linear interpolation of rows, then columns."""
    rows, columns = (
        np.linspace(0, before - 1, after) for before, after in zip(values.shape, (height, width), strict=True)
    )
    values = np.stack([np.interp(rows, np.arange(len(column)), column) for column in values.T], 1)
    return np.stack([np.interp(columns, np.arange(len(row)), row) for row in values])


class TestLocalization:
    def test_present_classes_only_each_up_to_255(self, images: list[Image]) -> None:
        found = maps_of(Colours(), images)
        assert set(found) == {(image.id, tag) for image in images for tag in image.tags}
        assert all(values.max() == 255 and values.dtype == np.uint8 for values in found.values())

    def test_maps_lie_on_the_stored_grid(self, images: list[Image]) -> None:
        for stride in (4, 7, 1):
            found = maps_of(Colours(), images, stride=stride)
            for image in images:
                expected = -(-image.height // stride), -(-image.width // stride)
                assert all(found[image.id, tag].shape == expected for tag in image.tags)

    @pytest.mark.parametrize("fusion", ["mean", "max"])
    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.5)])
    def test_scales_and_flips_are_fused_before_the_division(
        self, images: list[Image], scales: tuple[float, ...], flip: bool, fusion: str
    ) -> None:
        found = maps_of(Colours(), images, scales=scales, flip=flip, fusion=fusion)
        for image in images:
            passes = torch.stack(
                [plain(image, scale, f) for scale in scales for f in ([False, True] if flip else [False])]
            )
            fused = passes.mean(0) if fusion == "mean" else passes.amax(0)
            for tag in image.tags:
                expected = 255 * fused[tag - 1] / fused[tag - 1].max()
                assert np.abs(found[image.id, tag] - expected.numpy()).max() <= 0.51

    def test_aligned_corners_are_drss(self, images: list[Image]) -> None:
        """DRS's code at stride 1: a map's outermost centres lie on the image's outermost pixels; in float64 NumPy."""
        found = maps_of(Colours(), images, stride=1, align_corners=True)
        for image in images:
            x = normalise(read_rgb(image))[None].double()
            cells = -(-image.height // 8), -(-image.width // 8)
            maps = functional.interpolate(x, cells, mode="bilinear", align_corners=False, antialias=True)[0].numpy()
            for tag in image.tags:
                values = aligned(np.maximum(maps[tag - 1], 0), image.height, image.width)
                assert np.abs(found[image.id, tag] - 255 * values / values.max()).max() <= 0.51

    @pytest.mark.parametrize("fusion", ["mean", "max"])
    def test_regressed_values_stay_as_they_are(self, images: list[Image], fusion: str) -> None:
        """Without division by the maximum four passes that agree give what one of them gives, cut at 1."""
        found = maps_of(Constant(), images, scales=(1.0, 0.5), flip=True, fusion=fusion, normalise="none")
        for image in images:
            for tag in image.tags:
                assert np.unique(found[image.id, tag]).tolist() == [round(255 * min(1.0, 0.4 * tag))]

    def test_a_symmetric_network_sees_a_flipped_image_flipped(self, tmp_path: Path, images: list[Image]) -> None:
        rgb = read_rgb(images[0])
        mirrored = saved(tmp_path, "mirrored", np.ascontiguousarray(rgb[:, ::-1]), images[0].tags)
        for flip in (False, True):
            found = maps_of(Colours(), [images[0], mirrored], flip=flip)
            for tag in (1, 3):
                one, other = found["image0", tag].astype(int), found["mirrored", tag].astype(int)
                assert np.abs(one[:, ::-1] - other).max() <= 1
                assert (one != other).any()

    def test_flips_are_undone(self, tmp_path: Path) -> None:
        """A network that always looks left: its plain map lies left, the mean with its flipped pass on both sides."""

        class Left(nn.Module):
            def localize(self, x: Tensor) -> Tensor:
                maps = torch.zeros(len(x), K, 4, 8)
                maps[..., 0] = 1
                return maps

        image = saved(tmp_path, "grey", np.full((16, 32, 3), 100, np.uint8), (2,))
        left = maps_of(Left(), [image])["grey", 2]
        both = maps_of(Left(), [image], flip=True)["grey", 2]
        assert left[0].tolist() == [255] + 7 * [0]
        assert both[0].tolist() == [255, 0, 0, 0, 0, 0, 0, 255]

    def test_the_input_takes_the_size_asked_for(self, images: list[Image]) -> None:
        for settings, expected in [
            ({"side": "square", "length": 64}, {(64, 64)}),
            ({"side": "short", "length": 64}, {(64, 96), (96, 64), (64, 107)}),
            ({"side": "long", "length": 24, "scales": (2.0,)}, {(32, 48), (48, 32), (28, 48)}),
        ]:
            network = Colours()
            found = maps_of(network, images, **settings)
            assert set(network.sizes) == expected
            assert found["image0", 1].shape == (8, 12)

    def test_a_map_without_a_positive_value_is_zero(self, tmp_path: Path) -> None:
        image = saved(tmp_path, "black", np.zeros((16, 16, 3), np.uint8), (1, 2))
        assert not any(values.any() for values in maps_of(Colours(), [image]).values())

    def test_neighbours_in_a_batch_change_nothing(self, images: list[Image]) -> None:
        together = maps_of(Colours(), images)
        for image in images:
            for key, values in maps_of(Colours(), [image]).items():
                assert values.tolist() == together[key].tolist()


class Scores(nn.Module):
    """Logits of background and three classes at stride 8, from the image's channels."""

    def forward(self, x: Tensor) -> Tensor:
        features = functional.avg_pool2d(x, 8, ceil_mode=True)
        return torch.cat([torch.full_like(features[:, :1], 0.3), 2 * features], 1)


def labels_of(images: Sequence[Image], **settings: Any) -> dict[str, NDArray[np.uint8]]:
    rows = segmentations(Scores(), images, schema.Test(**settings), CPU, map)
    return {name: values for name, kind, values in rows if kind == LABELS}


def chances(image: Image, scales: Sequence[float], flip: bool) -> Tensor:
    """(K + 1) x H x W by the formula: softmax of the logits at the image's size, then the mean."""
    x = normalise(read_rgb(image))[None].double()
    size = image.height, image.width
    views = []
    for scale in scales:
        scaled = x
        if scale != 1:
            small = round(size[0] * scale), round(size[1] * scale)
            scaled = functional.interpolate(x, size=small, mode="bilinear", align_corners=False, antialias=scale < 1)
        for flipped in [False, True] if flip else [False]:
            logits = Scores()(scaled.flip(3) if flipped else scaled)
            logits = functional.interpolate(
                logits.flip(3) if flipped else logits, size=size, mode="bilinear", align_corners=False
            )
            views.append(logits.softmax(1)[0])
    return torch.stack(views).mean(0)


class TestSegmentation:
    @pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((1.0,), True), ((0.5, 1.0, 1.5), True)])
    def test_labels_are_the_argmax_of_the_mean_softmax(
        self, images: list[Image], scales: tuple[float, ...], flip: bool
    ) -> None:
        found = labels_of(images, scales=scales, flip=flip)
        assert set(found) == {image.id for image in images}
        for image in images:
            expected = chances(image, scales, flip)
            assert found[image.id].shape == (image.height, image.width)
            assert found[image.id].dtype == np.uint8
            ranked = expected.sort(0, descending=True).values
            clear = (ranked[0] - ranked[1] > 1e-5).numpy()
            assert clear.mean() > 0.99
            assert (found[image.id] == expected.argmax(0).numpy())[clear].all()
        assert {value for values in found.values() for value in np.unique(values).tolist()} == {0, 1, 2, 3}

    def test_crf_refines_the_classes_that_come_close(self, images: list[Image]) -> None:
        """The same labels as the CRF over all classes, at a fraction of its time."""
        settings = Crf(iterations=3)
        found = labels_of(images[:1], crf=settings)["image0"]
        everything = chances(images[0], (1.0,), False).float().numpy()
        expected = dense_crf(read_rgb(images[0]), everything, settings).argmax(0)
        assert (found == expected).mean() > 0.995
        assert (found != labels_of(images[:1])["image0"]).any()

    def test_the_crf_sees_the_classes_above_a_twentieth_and_all_that_win(
        self, images: list[Image], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of five classes: one wins, one reaches 0.06, one 0.05, one less; the last wins a pixel at 0.04."""
        image = Image("x", images[0].file, 32, 48, (), None, None)
        values = np.zeros((5, 32, 48), np.float32)
        values[0], values[1], values[2], values[3] = 0.9, 0.06, np.float32(0.05), 0.02
        values[:, 5, 7] = 0.0, 0.0, 0.0, 0.0, 0.04
        seen: list[NDArray[np.float32]] = []

        def unchanged(rgb: Any, probabilities: NDArray[np.float32], settings: Crf) -> NDArray[np.float32]:
            seen.append(probabilities)
            return probabilities

        monkeypatch.setattr(segment, "dense_crf", unchanged)
        monkeypatch.setattr(segment, "class_probabilities", lambda *_: torch.from_numpy(values)[None])
        (_, _, label), _ = segmentations(Scores(), [image], schema.Test(crf=Crf()), CPU, map)
        assert np.array_equal(seen[0], values[[0, 1, 4]])
        assert label.dtype == np.uint8
        assert label[5, 7] == 4
        assert not np.delete(label, 5 * 48 + 7).any()

    def test_a_mapper_that_loses_an_image_is_an_error(self, images: list[Image]) -> None:
        def mapper(function: Any, tasks: Any) -> Any:
            return list(map(function, tasks))[1:]

        with pytest.raises(ValueError, match="shorter"):
            list(segmentations(Scores(), images[:1], schema.Test(crf=Crf(iterations=1)), CPU, mapper))

    def test_the_mapper_gets_one_task_an_image(self, images: list[Image]) -> None:
        calls: list[int] = []

        def mapper(function: Any, tasks: Any) -> Any:
            calls.append(len(tasks))
            return map(function, tasks)

        rows = list(segmentations(Scores(), images, schema.Test(crf=Crf(iterations=1)), CPU, mapper))
        assert sorted(calls) == [1, 1, 2]
        shapes = {(name, kind): values.shape for name, kind, values in rows}
        assert shapes == {(i.id, LABELS): i.size for i in images} | {
            (i.id, DOUBT): (-(-(i.height - 4) // 8), -(-(i.width - 4) // 8)) for i in images
        }

    def test_network_and_crf_take_turns(self, images: list[Image]) -> None:
        """So that a job on N cores can have N threads for the network and N processes for the CRF."""
        events: list[str] = []

        class Noted(Scores):
            def forward(self, inputs: Tensor) -> Tensor:
                events.append("network")
                result: Tensor = super().forward(inputs)
                return result

        def mapper(function: Any, tasks: Any) -> Any:
            events.append("CRF starts")
            yield from map(function, tasks)
            events.append("CRF ends")

        list(segmentations(Noted(), images, schema.Test(crf=Crf(iterations=1)), CPU, mapper))
        assert events == ["network", "CRF starts", "CRF ends"] * 3

    @pytest.mark.parametrize("crf", [None, Crf(iterations=1)])
    @pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((1.0, 1.5), True)])
    def test_doubt_is_the_rest_of_the_largest_probability(
        self, images: list[Image], scales: tuple[float, ...], flip: bool, crf: Crf | None
    ) -> None:
        settings = schema.Test(scales=scales, flip=flip, crf=crf)
        rows = segmentations(Scores(), images, settings, CPU, map)
        doubt = {name: values for name, kind, values in rows if kind == DOUBT}
        assert set(doubt) == {image.id for image in images}
        for image in images:
            rest = 1 - chances(image, scales, flip).amax(0).numpy()
            assert doubt[image.id] == pytest.approx(255 * rest[4::8, 4::8], abs=0.51)


def test_the_crf_takes_a_network_that_knows_nothing(images: list[Image]) -> None:
    """21 classes, none of which reaches 5 %: one of them must win all the same."""

    class Uniform(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), 21, x.shape[2] // 8, x.shape[3] // 8)

    (_, _, label), _ = segmentations(Uniform(), images[:1], schema.Test(crf=Crf(iterations=1)), CPU, map)
    assert not label.any()
