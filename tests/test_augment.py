"""Augmentation: alignment of image and label map, cropping before the jitter, sizes and resize filters."""

import colorsys
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.schema import Augmentation
from pipeline.data import loading
from pipeline.data.collation import collate
from pipeline.data.geometry import Window
from pipeline.data.loading import IGNORE, MEAN, STD, Item, normalise, resize, resized

COLOURS = np.array([(10, 200, 30), (220, 40, 90), (60, 60, 240)], np.uint8)  # colours of the classes 0, 1, 2


def augment(
    rgb: NDArray[np.uint8], label: NDArray[np.uint8] | None, settings: Augmentation, random: np.random.Generator
) -> tuple[Tensor, Tensor | None, Window]:
    """The input of an image on the CPU: 3 x H x W normalised, H x W labels, window."""
    sample = loading.augment(rgb, label, settings, random)
    batch = collate([Item(sample, torch.zeros(1), "a")]).to(torch.device("cpu"))
    return batch.images[0], None if batch.labels is None else batch.labels[0], batch.windows[0]


def blocks(height: int, width: int, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image of 8 x 8 blocks whose colours encode their classes, and its label map."""
    random = np.random.default_rng(seed)
    label = random.integers(0, 3, (-(-height // 8), -(-width // 8))).astype(np.uint8)
    label = label.repeat(8, 0).repeat(8, 1)[:height, :width]
    return COLOURS[label], label


def pixels(images: Tensor) -> NDArray[np.float32]:
    """3 x H x W normalised -> H x W x 3 in 0..255."""
    values: NDArray[np.float32] = (images.numpy().transpose(1, 2, 0) * STD + MEAN) * 255
    return values


def nearest_colour(rgb: NDArray[np.float32]) -> NDArray[np.intp]:
    distance = ((rgb[:, :, None] - COLOURS.astype(np.float32)) ** 2).sum(-1)
    winners: NDArray[np.intp] = distance.argmin(-1)
    return winners


def filter_matrix(before: int, after: int) -> NDArray[np.float64]:
    """Resampling matrix of an axis (after x before): area means if it shrinks, cubic convolution if it grows."""
    if after <= before:
        edges = np.arange(after + 1) * before / after
        covered = np.minimum(edges[1:, None], np.arange(before) + 1) - np.maximum(edges[:-1, None], np.arange(before))
        weights: NDArray[np.float64] = covered.clip(0) * after / before
        return weights
    a = -0.75  # coefficient of OpenCV's cubic kernel
    matrix = np.zeros((after, before))
    for row, place in enumerate((np.arange(after) + 0.5) * before / after - 0.5):
        for cell in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            d = abs(place - cell)
            near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
            matrix[row, min(max(cell, 0), before - 1)] += near if d <= 1 else far
    return matrix


class TestAugment:
    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize(
        "settings",
        [
            Augmentation(),
            Augmentation(crop=40),
            Augmentation(scale=(0.6, 1.7), crop=48),
            Augmentation(side="short", length=(60, 90), scale=(0.7, 1.3), crop=100),
            Augmentation(side="square", length=(64, 64)),
        ],
    )
    def test_label_and_image_stay_aligned(self, settings: Augmentation, seed: int) -> None:
        """Every label still matches the colour of its pixel, except for the blur at block edges."""
        rgb, label = blocks(72, 90, seed)
        tensor, classes, _ = augment(rgb, label, settings, np.random.default_rng(seed))
        assert classes is not None
        assert classes.dtype == torch.int64
        assert classes.shape == tensor.shape[1:]
        found = classes.numpy()
        kept = found != IGNORE
        assert kept.any()
        assert not tensor[:, torch.from_numpy(~kept)].any()  # both have the same padding
        inner = cv2.erode(kept.astype(np.uint8), np.ones((5, 5)), borderValue=0) > 0
        for class_id in range(3):  # away from block edges
            same = cv2.erode((found == class_id).astype(np.uint8), np.ones((5, 5)), borderValue=0) > 0
            inner[(found == class_id) & ~same] = False
        assert inner.sum() > 100
        assert (nearest_colour(pixels(tensor)) == found)[inner].all()

    def test_the_window_locates_the_crop(self) -> None:
        """A colour ramp encodes each pixel's position, which must match the window."""
        y, x = np.mgrid[:100, :150].astype(np.float32)
        rgb = np.stack([y, x, 0 * y], -1).astype(np.uint8)
        sides = set()
        for seed in range(20):
            tensor, _, window = augment(rgb, None, Augmentation(crop=60), np.random.default_rng(seed))
            found = pixels(tensor)
            rows = window.top * 100 + np.arange(60)
            columns = window.left * 150 + np.arange(60)
            columns = 149 - columns if window.flip else columns
            np.testing.assert_allclose(found[..., 0], np.broadcast_to(rows[:, None], (60, 60)), atol=1e-3)
            np.testing.assert_allclose(found[..., 1], np.broadcast_to(columns, (60, 60)), atol=1e-3)
            assert window.bottom - window.top == pytest.approx(0.6)
            assert window.right - window.left == pytest.approx(0.4)
            sides.add(window.flip)
        assert sides == {False, True}

    def test_padding_is_ignore_and_the_mean_colour(self) -> None:
        """An image of 20 x 30 lies completely, at a random place, within a crop of 48."""
        rgb, label = blocks(20, 30)
        corners = set()
        for seed in range(12):
            tensor, classes, window = augment(
                rgb, label, Augmentation(crop=48, flip=False), np.random.default_rng(seed)
            )
            assert classes is not None
            top, left = round(-window.top * 20), round(-window.left * 30)
            expected = np.full((48, 48), IGNORE)
            expected[top : top + 20, left : left + 30] = label
            assert classes.tolist() == expected.tolist()
            assert torch.equal(tensor[:, top : top + 20, left : left + 30], normalise(rgb))
            assert not tensor[:, classes == IGNORE].any()
            corners.add((top, left))
        assert len(corners) > 5

    def test_a_crop_of_the_images_size_is_the_image(self) -> None:
        rgb, label = blocks(32, 32)
        tensor, classes, window = augment(rgb, label, Augmentation(crop=32, flip=False), np.random.default_rng(0))
        assert classes is not None
        assert torch.equal(tensor, normalise(rgb))
        assert classes.tolist() == label.tolist()
        assert window == Window()

    def test_flip_happens_half_of_the_time_or_never(self) -> None:
        rgb, _ = blocks(8, 8)
        for flip, expected in [(True, 200), (False, 0)]:
            drawn = sum(
                augment(rgb, None, Augmentation(flip=flip), np.random.default_rng(seed))[2].flip for seed in range(400)
            )
            assert abs(drawn - expected) <= (40 if flip else 0)

    def test_lengths_and_scales_cover_their_range(self) -> None:
        rgb, _ = blocks(40, 50)
        settings = Augmentation(side="short", length=(20, 24))
        heights = Counter(augment(rgb, None, settings, np.random.default_rng(seed))[0].shape[1] for seed in range(100))
        assert sorted(heights) == [20, 21, 22, 23, 24]
        settings = Augmentation(scale=(0.5, 1.5))
        heights = Counter(augment(rgb, None, settings, np.random.default_rng(seed))[0].shape[1] for seed in range(100))
        assert 20 <= min(heights) <= 23
        assert 57 <= max(heights) <= 60

    def test_a_stored_label_of_another_size_follows_the_image(self) -> None:
        rgb, label = blocks(64, 80)
        _, classes, _ = augment(rgb, label[::2, ::2], Augmentation(flip=False), np.random.default_rng(0))
        assert classes is not None
        assert classes.tolist() == label.tolist()

    @pytest.mark.parametrize("size", [(7, 23), (29, 13), (20, 20), (33, 50)])
    def test_a_label_map_is_resized_to_the_label_under_each_centre(self, size: tuple[int, int]) -> None:
        """Sizes change by fractions; sampling at pixel corners would be half a pixel off."""
        label = np.arange(11 * 19, dtype=np.uint8).reshape(11, 19)  # odd: no centre lies between two labels
        rows, columns = (
            [int((n + 0.5) * before / after) for n in range(after)]
            for before, after in zip(label.shape, size, strict=True)
        )
        rgb = np.zeros((*size, 3), np.uint8)
        _, classes, _ = augment(rgb, label, Augmentation(flip=False), np.random.default_rng(0))
        assert classes is not None
        assert classes.tolist() == label[rows][:, columns].tolist()

    def test_a_thin_image_keeps_a_pixel_at_any_scale(self) -> None:
        for shape in ((1, 9, 3), (9, 1, 3)):
            found = augment(np.ones(shape, np.uint8), None, Augmentation(scale=(0.3, 0.3)), np.random.default_rng(0))[0]
            assert found.shape[1:] == (max(1, round(0.3 * shape[0])), max(1, round(0.3 * shape[1])))


class TestCropFirst:
    """Jitter and normalisation after the crop must equal the crop of the fully processed image."""

    @pytest.mark.parametrize("crop", [1, 17, 40, 90])
    @pytest.mark.parametrize("jitter", [None, (0.3, 0.3, 0.3, 0.0), (0.4, 0.9, 0.5, 0.2)])
    def test_a_crop_equals_that_of_the_whole_image_to_the_byte(
        self, crop: int, jitter: tuple[float, float, float, float] | None
    ) -> None:
        """The jitter is the same without a crop, since the offsets are drawn last."""
        noise = np.random.default_rng(0)
        starts = set()
        for seed in range(10):
            height, width = noise.integers(20, 100, 2).tolist()
            rgb, label = noise.integers(0, 256, (height, width, 3)).astype(np.uint8), blocks(height, width)[1]
            settings = Augmentation(scale=(0.8, 1.2), jitter=jitter)
            whole, classes, _ = augment(rgb, label, settings, np.random.default_rng(seed))
            settings = Augmentation(scale=(0.8, 1.2), jitter=jitter, crop=crop)
            found, found_classes, window = augment(rgb, label, settings, np.random.default_rng(seed))
            assert classes is not None
            assert found_classes is not None
            rows, columns = whole.shape[1:]
            top, left = round(window.top * rows), round(window.left * columns)
            canvas, labels = torch.zeros(3, 400, 400), torch.full((400, 400), IGNORE)
            canvas[:, 100 : 100 + rows, 100 : 100 + columns] = whole
            labels[100 : 100 + rows, 100 : 100 + columns] = classes
            at = np.s_[100 + top : 100 + top + crop, 100 + left : 100 + left + crop]
            assert torch.equal(found, canvas[(slice(None), *at)])
            assert torch.equal(found_classes, labels[at])
            starts.add((top, left))
        assert len(starts) > 5

    def test_each_level_is_normalised_as_by_the_formula(self) -> None:
        rgb = np.arange(256 * 3).reshape(16, 16, 3).astype(np.uint8)
        expected = ((rgb.astype(np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)
        for view in (np.s_[:], np.s_[3:9, 2:7], np.s_[:, ::-1]):
            assert np.array_equal(normalise(rgb[view]).numpy(), expected[(slice(None), *np.index_exp[view])])
        assert {*rgb.flat} == {*range(256)}


class TestJitter:
    GREY = np.full((6, 7, 3), 100, np.uint8)

    def jittered(self, rgb: NDArray[np.uint8], *strength: float, seed: int = 0) -> NDArray[np.float32]:
        settings = Augmentation(flip=False, jitter=strength)  # type: ignore[arg-type]
        return pixels(augment(rgb, None, settings, np.random.default_rng(seed))[0])

    def test_brightness_is_a_factor_within_its_bounds(self) -> None:
        levels = [float(self.jittered(self.GREY, 0.3, 0, 0, 0, seed=seed).mean()) for seed in range(200)]
        assert min(levels) >= 69
        assert max(levels) <= 130.01
        assert min(levels) < 75
        assert max(levels) > 125

    def test_contrast_keeps_the_mean_and_bounds_the_spread(self) -> None:
        rgb = np.repeat(np.array([60, 140], np.uint8), 8).reshape(4, 4, 1).repeat(3, 2)
        for seed in range(40):
            found = self.jittered(rgb, 0, 0.5, 0, 0, seed=seed)
            assert found.mean() == pytest.approx(100, abs=1)
            assert 40 - 1 <= found.max() - found.min() <= 120 + 1

    def test_saturation_leaves_grey_alone_and_bounds_colour(self) -> None:
        assert np.abs(self.jittered(self.GREY, 0, 0, 0.9, 0) - 100).max() <= 1.01
        rgb = np.broadcast_to(np.array([140, 100, 80], np.uint8), (4, 4, 3)).copy()
        grey = 0.299 * 140 + 0.587 * 100 + 0.114 * 80
        for seed in range(40):
            red, green, blue = self.jittered(rgb, 0, 0, 0.4, 0, seed=seed)[0, 0]
            factor = (red - blue) / (140 - 80)
            assert 0.6 - 0.05 <= factor <= 1.4 + 0.05
            assert green == pytest.approx(grey + factor * (100 - grey), abs=1.5)

    def test_hue_turns_within_its_bounds(self) -> None:
        """Pure red rotates by at most a tenth of the circle, so that green and blue reach at most 0.6 of red."""
        red = np.broadcast_to(np.array([200, 0, 0], np.uint8), (4, 4, 3)).copy()
        rises = []
        for seed in range(60):
            r, g, b = self.jittered(red, 0, 0, 0, 0.1, seed=seed)[0, 0]
            assert r == pytest.approx(200, abs=2)
            assert min(g, b) <= 1
            rises.append(max(g, b) / 200)
        assert max(rises) <= 0.6 + 0.02
        assert max(rises) > 0.5

    @pytest.mark.parametrize("strength", [(0.4, 0.5, 0.6, 0.0), (1.5, 0.2, 0.0, 0.0), (0.0, 1.5, 1.5, 0.0)])
    def test_the_formula(self, strength: tuple[float, float, float, float]) -> None:
        """Compare with float64: brightness, contrast about the mean grey level, saturation about each pixel's grey."""
        grey = np.array([0.299, 0.587, 0.114])
        for seed in range(20):
            rgb = np.random.default_rng(seed).integers(0, 256, (9, 11, 3)).astype(np.uint8)
            random = np.random.default_rng(seed)
            brightness, contrast, saturation = (random.uniform(max(0, 1 - s), 1 + s) for s in strength[:3])
            values = rgb * brightness
            mean = (values @ grey).mean()
            values = mean + (values - mean) * contrast
            level = (values @ grey)[..., None]
            values = level + (values - level) * saturation
            found = self.jittered(rgb, *strength, seed=seed)
            assert np.abs(found - values.clip(0, 255)).max() <= 0.5 + 1e-2

    def test_the_hue_turns_by_the_draw(self) -> None:
        """Compare with Python's colorsys, within the step size of OpenCV's hue and saturation."""
        rgb = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
        for seed in range(20):
            random = np.random.default_rng(seed)
            random.random(3)  # the other three factors, which are 1
            turn = round(180 * random.uniform(-0.4, 0.4)) / 180
            expected = np.empty(rgb.shape)
            for at in np.ndindex(6, 8):
                hue, saturation, value = colorsys.rgb_to_hsv(*rgb[at].tolist())
                expected[at] = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
            found = self.jittered(rgb, 0, 0, 0, 0.4, seed=seed)
            assert np.abs(found - expected).max() <= 6
            assert np.abs(found - expected).mean() <= 1.5

    def test_values_stay_in_a_pixels_range(self) -> None:
        rgb = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        for seed in range(20):
            found = self.jittered(rgb, 0.9, 0.9, 0.9, 0.3, seed=seed)
            assert found.min() >= -1e-3
            assert found.max() <= 255 + 1e-3


class TestSizes:
    @pytest.mark.parametrize(
        ("side", "length", "expected"),
        [
            ("short", 224, (224, 299)),  # 375 x 500: 500 * 224 / 375 = 298.7
            ("long", 300, (225, 300)),
            ("square", 320, (320, 320)),
            ("none", None, (375, 500)),
            ("none", 300, (375, 500)),
        ],
    )
    def test_sides(self, side: str, length: int | None, expected: tuple[int, int]) -> None:
        assert resized(375, 500, side, length) == expected

    def test_a_thin_image_keeps_a_pixel(self) -> None:
        assert resized(1, 900, "long", 100) == (1, 100)
        assert resized(900, 1, "long", 100) == (100, 1)

    def test_shrinking_averages(self) -> None:
        """A chequerboard of single pixels becomes its mean, without aliasing."""
        y, x = np.mgrid[:32, :32]
        board = (((y + x) % 2) * 255).astype(np.uint8)[..., None].repeat(3, 2)
        assert np.abs(resize(board, (8, 8)).astype(int) - 128).max() <= 1

    @pytest.mark.parametrize("size", [(30, 41), (61, 90), (30, 90), (61, 41), (47, 41), (30, 53), (47, 90), (47, 53)])
    def test_each_axis_is_filtered_by_its_own_rule(self, size: tuple[int, int]) -> None:
        """Compare random 47 x 53 images, each axis shrunk, grown or unchanged, with float64 filter matrices."""
        rgb = np.random.default_rng(0).integers(60, 190, (47, 53, 3)).astype(np.uint8)
        rows, columns = (filter_matrix(*pair) for pair in zip(rgb.shape, size, strict=False))
        expected = np.einsum("yi,ijc,xj->yxc", rows, rgb, columns).clip(0, 255)
        assert np.abs(resize(rgb, size) - expected).max() <= 2  # two roundings, the first one amplified by the cubic

    @pytest.mark.parametrize("shape", [(375, 500), (500, 375)])
    def test_stripes_of_a_pixel_do_not_alias(self, shape: tuple[int, int]) -> None:
        """From VOC sizes to DRS's: stripes along the axis that shrinks to 384 keep the area filter's deviation."""
        stripes = np.arange(500) % 2 * 255.0
        image = np.broadcast_to(stripes if shape[1] == 500 else stripes[:, None], shape)
        found = resize(image.astype(np.uint8)[..., None].repeat(3, 2), (384, 384))[..., 0]
        deviation = found.std(axis=shape.index(500))
        assert deviation == pytest.approx(np.full(384, (filter_matrix(500, 384) @ stripes).std()), abs=0.5)
        assert deviation.max() < 51  # cubic: 88.8, bilinear: 63.4
