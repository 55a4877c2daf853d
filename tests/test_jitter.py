"""Colour jitter: OpenCV's bytes, whatever the width, the crop and the device."""

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.data import jitter

STRENGTH = (0.3, 0.3, 0.3, 0.1)
LANES = 64  # pixels that OpenCV converts at once at most


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (height, width, 3)).astype(np.uint8)


def by_opencv(rgb: NDArray[np.uint8], factors: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The jitter in NumPy and OpenCV, on rows of whole blocks of ``LANES`` pixels."""
    brightness, contrast, saturation, mean = factors[:4]
    values = (rgb.astype(np.float32) * brightness - mean) * contrast + mean
    grey = sum((values[..., c] * jitter.GREY[c] for c in (1, 2)), values[..., 0] * jitter.GREY[0])[..., None]
    changed = np.rint(((values - grey) * saturation + grey).clip(0, 255)).astype(np.uint8)
    if len(factors) == 4:
        return changed
    flat = np.zeros((-(-changed.size // 3 // LANES) * LANES, 3), np.uint8)
    flat[: changed.size // 3] = changed.reshape(-1, 3)
    hsv = cv2.cvtColor(flat.reshape(-1, LANES, 3), cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(np.int16) + int(factors[4])) % 180
    turned = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).reshape(-1, 3)[: changed.size // 3]
    return turned.reshape(rgb.shape).astype(np.uint8)


def applied(rgb: NDArray[np.uint8], factors: NDArray[np.float32], device: str = "cpu") -> NDArray[np.uint8]:
    pixels, row = torch.from_numpy(rgb)[None].to(device), torch.from_numpy(factors)[None].to(device)
    found: NDArray[np.uint8] = jitter.apply(pixels, row)[0].cpu().numpy()
    return found


@pytest.mark.parametrize("strength", [STRENGTH, (0.4, 0.9, 1.5, 0.5), (0.3, 0.3, 0.3, 0.0)])
def test_it_is_opencvs(strength: tuple[float, float, float, float]) -> None:
    for seed in range(20):
        rgb = picture(37, 41 + seed, seed)
        factors = jitter.draw(strength, rgb, np.random.default_rng(seed))
        assert len(factors) == (5 if strength[3] else 4)
        assert np.array_equal(applied(rgb, factors), by_opencv(rgb, factors))


@pytest.mark.parametrize("turn", [-90, -37, -1, 0, 44, 90])
def test_every_colour_turns_as_in_opencv(turn: int) -> None:
    """Each fourth level of each channel, and the two ends: 281,216 colours."""
    levels = np.unique([*range(0, 256, 4), 255])
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(len(levels), -1, 3).astype(np.uint8)
    factors = np.array([1, 1, 1, 100, turn], np.float32)
    assert np.array_equal(applied(rgb, factors), by_opencv(rgb, factors))


def test_opencv_itself_differs_by_at_most_a_level_at_the_ends_of_rows() -> None:
    rgb = picture(64, 257)
    factors = np.array([1, 1, 1, 100, 13], np.float32)
    hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(np.int16) + 13) % 180
    difference = np.abs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(int) - applied(rgb, factors))
    assert difference.max() <= 1
    assert not difference[:, : 257 // LANES * LANES].any()


def test_images_of_a_batch_have_their_own_factors() -> None:
    images = [picture(20, 30, seed) for seed in range(3)]
    factors = [jitter.draw(STRENGTH, rgb, np.random.default_rng(seed)) for seed, rgb in enumerate(images)]
    together = jitter.apply(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(factors)))
    for found, rgb, row in zip(together.numpy(), images, factors, strict=True):
        assert np.array_equal(found, applied(rgb, row))


def test_a_draw_reads_the_mean_of_the_brightened_image() -> None:
    rgb = picture(30, 40)
    brightness, *_, mean, _ = jitter.draw(STRENGTH, rgb, np.random.default_rng(3))
    assert mean == pytest.approx((rgb @ np.array([0.299, 0.587, 0.114])).mean() * brightness, rel=1e-5)
    assert brightness != pytest.approx(1)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_computes_the_same_bytes() -> None:
    for seed in range(5):
        rgb = picture(61, 77, seed)
        factors = jitter.draw(STRENGTH, rgb, np.random.default_rng(seed))
        assert np.array_equal(applied(rgb, factors, "cuda"), applied(rgb, factors))
