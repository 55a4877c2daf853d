"""Image files that a decoder accepts or expands although they are cut off, enormous or of another depth."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline.data.build_index import build_index
from pipeline.data.checks import mask_values, saliency_values
from pipeline.data.complete import InvalidFile
from pipeline.errors import PipelineError
from tests.voc_tree import image_size, make_tree

PIXELS = 10**6
END = b"\xff\xd9"
REAL = [Path("../shared/data") / name / "JPEGImages" for name in ("voc12_mini", "voc12_fullsize_48")]
ENCODINGS: dict[str, list[int]] = {
    "baseline": [],
    "progressive": [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
    "restarts": [cv2.IMWRITE_JPEG_RST_INTERVAL, 2],
    "coarse": [cv2.IMWRITE_JPEG_QUALITY, 20],
}


def picture(channels: int = 3) -> np.ndarray[Any, Any]:
    """Smooth shapes with noise, like a photo."""
    noise = np.random.default_rng(0).normal(0, 12, (120, 160, channels))
    shade = np.add.outer(np.arange(120), np.arange(160))[..., None] / 2
    return np.clip(shade + noise, 0, 255).astype(np.uint8)


def jpeg(options: list[int], channels: int = 3) -> bytes:
    return cv2.imencode(".jpg", picture(channels), options)[1].tobytes()


def png(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    """A PNG of zeros, packed as tightly as possible."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = 1 + width * bits // 8 * (3 if colour == 2 else 1)
    packer = zlib.compressobj(9)
    data = b"".join([*(packer.compress(bytes(row)) for _ in range(height)), packer.flush()])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_cut_off_before_its_end_marker_is_refused(encoding: str, channels: int) -> None:
    data = jpeg(ENCODINGS[encoding], channels)
    assert data.endswith(END)
    assert image_size(data, PIXELS) == (120, 160)
    assert image_size(data + b"camera", PIXELS) == (120, 160)
    for length in range(700, len(data) - 12, 17):  # tables end before byte 700
        with pytest.raises(InvalidFile):
            image_size(data[:length] + END, PIXELS)


def test_a_cut_jpeg_with_a_thumbnail_is_refused() -> None:
    whole = jpeg([])
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + 900) + whole[:898] + END
    data = whole[:2] + thumbnail + whole[2:]
    assert image_size(data, PIXELS) == (120, 160)
    with pytest.raises(InvalidFile, match="truncated JPEG, despite its end marker"):
        image_size(data[: len(data) // 2] + END, PIXELS)


@pytest.mark.parametrize("folder", [path for path in REAL if path.is_dir()], ids=lambda path: path.parent.name)
def test_no_real_image_counts_as_cut_but_its_first_half_does(folder: Path) -> None:
    for path in sorted(folder.iterdir())[::10]:
        data = path.read_bytes()
        image_size(data, PIXELS)
        with pytest.raises(InvalidFile, match="truncated"):
            image_size(data[: len(data) // 2] + END, PIXELS)


@pytest.mark.parametrize("read", [image_size, mask_values, saliency_values])
def test_the_header_alone_refuses_too_many_pixels(read: Callable[[bytes, int], Any]) -> None:
    """The file would expand to 900 million pixels, and takes 3 GB as RGB."""
    data = png(30_000, 1, colour=0)
    data = data[:20] + struct.pack(">I", 30_000) + data[24:]
    with pytest.raises(InvalidFile, match=r"has 900 megapixels \(30000x30000\), but at most 100 are read; scale"):
        read(data, 100 * 10**6)


@pytest.mark.parametrize("encoding", ["baseline", "progressive"])
def test_the_frame_header_alone_refuses_too_many_pixels(encoding: str) -> None:
    data = jpeg(ENCODINGS[encoding])
    frame = data.index(b"\xff\xc2" if encoding == "progressive" else b"\xff\xc0")
    data = data[: frame + 5] + struct.pack(">HH", 60_000, 50_000) + data[frame + 9 :]
    with pytest.raises(InvalidFile, match=r"has 3000 megapixels \(50000x60000\)"):
        image_size(data, PIXELS)


def test_a_limit_accepts_exactly_its_number_of_pixels() -> None:
    assert image_size(jpeg([]), 120 * 160) == (120, 160)
    with pytest.raises(InvalidFile, match="megapixels"):
        image_size(jpeg([]), 120 * 160 - 1)
    assert mask_values(png(6, 5, colour=0), 30).shape == (5, 6)
    with pytest.raises(InvalidFile, match="megapixels"):
        mask_values(png(6, 5, colour=0), 29)


@pytest.mark.parametrize("read", [mask_values, saliency_values])
def test_16_bits_are_refused_instead_of_losing_half(read: Callable[[bytes, int], Any]) -> None:
    with pytest.raises(InvalidFile, match="16-bit PNG"):
        read(png(4, 4, bits=16, colour=0), PIXELS)


def test_the_limit_is_a_param_of_the_dataset(tmp_path: Path) -> None:
    dataset = make_tree(tmp_path, train=1, evaluation=1, size=(40, 50))
    build_index(replace(dataset, max_megapixels=0.002), tmp_path / "Saliency")
    with pytest.raises(PipelineError) as caught:
        build_index(replace(dataset, max_megapixels=0.0019), tmp_path / "Saliency")
    lines = caught.value.lines
    assert len(lines) == 6  # two images, two masks and two maps
    assert lines[0].startswith(f"{tmp_path}/JPEGImages/img_000.jpg: has 0.002 megapixels (50x40), but at most 0.0019")
    assert all(line.endswith("scale it down or raise dataset.max_megapixels") for line in lines)
