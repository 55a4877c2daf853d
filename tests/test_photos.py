"""Photos as people have them: each format, depth, colour model and orientation gives the same upright RGB."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pillow_heif
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.data import photos
from pipeline.data.complete import InvalidFile
from pipeline.errors import PipelineError

COLOURS = np.random.default_rng(0).integers(0, 255, (3, 5, 3))
RGB = np.kron(COLOURS, np.ones((16, 16, 1))).astype(np.uint8)  # large squares, so that JPEG changes little
TURNS: dict[int, Callable[[Any], Any]] = {  # the stored pixels of each EXIF orientation
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: np.rot90(a, 2),
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}
pillow_heif.register_heif_opener()


def encode(values: Any, form: str, **options: Any) -> bytes:
    picture = values if isinstance(values, Image.Image) else Image.fromarray(np.ascontiguousarray(values))
    buffer = BytesIO()
    picture.save(buffer, format=form, **options)
    return buffer.getvalue()


def difference(data: bytes, expected: NDArray[Any] = RGB) -> float:
    seen = photos.read(data)
    assert seen.dtype == np.uint8
    assert seen.shape == expected.shape
    return float(np.abs(seen.astype(int) - expected).mean())


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "HEIF"])
def test_orientation_is_applied(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    options: dict[str, Any] = {"exif": exif.tobytes(), "quality": 95}
    if form == "TIFF":
        options = {"tiffinfo": {0x112: orientation}}
    assert difference(encode(TURNS[orientation](RGB), form, **options)) < 4


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_orientation_is_applied_to_16_bits(form: str, orientation: int) -> None:
    """The PNG gets the EXIF chunk of another file behind its pixels, where a PNG may have it."""
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = np.ascontiguousarray(TURNS[orientation](RGB)).astype(np.uint16) * 256
    if form == "TIFF":
        data = encode(Image.fromarray(stored[..., 1]), "TIFF", tiffinfo={0x112: orientation})
        assert difference(data, np.dstack([RGB[..., 1]] * 3)) == 0
        return
    donor, data = encode(RGB, "PNG", exif=exif), cv2.imencode(".png", stored[..., ::-1])[1].tobytes()
    start = donor.index(b"eXIf") - 4
    chunk = donor[start : start + 12 + int.from_bytes(donor[start : start + 4])]
    end = data.index(b"IEND") - 4
    assert difference(data[:end] + chunk + data[end:]) == 0


@pytest.mark.parametrize(
    ("mode", "form"), [("P", "PNG"), ("RGBA", "PNG"), ("RGB", "BMP"), ("RGB", "TIFF"), ("CMYK", "TIFF"), ("P", "GIF")]
)
def test_lossless_colours(mode: str, form: str) -> None:
    picture = Image.fromarray(RGB)
    data = encode(picture.quantize(256) if mode == "P" else picture.convert(mode), form)
    assert difference(data) <= 1


def test_cmyk_jpeg() -> None:
    assert difference(encode(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=95)) < 4


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16"])
def test_grey(mode: str) -> None:
    grey = np.asarray(Image.fromarray(RGB).convert("L"))
    values = {
        "L": Image.fromarray(grey),
        "LA": Image.fromarray(grey).convert("LA"),
        "1": Image.fromarray(grey > 128),
        "I;16": Image.fromarray(grey.astype(np.uint16) * 256),
    }[mode]
    expected = np.where(grey > 128, 255, 0) if mode == "1" else grey
    assert difference(encode(values, "PNG"), np.dstack([expected] * 3)) == 0


def test_transparent_pixels_are_white() -> None:
    alpha = np.full(RGB.shape[:2], 255, np.uint8)
    alpha[:16] = 0
    seen = photos.read(encode(np.dstack([RGB, alpha]), "PNG"))
    assert (seen[:16] == 255).all()
    assert np.array_equal(seen[16:], RGB[16:])


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_16_bit_files_are_as_bright_as_the_bits_that_they_use(suffix: str, bits: int) -> None:
    values = RGB | 0
    values[0, 0] = 255
    data = cv2.imencode(suffix, values[..., ::-1].astype(np.uint16) << (bits - 8))[1].tobytes()
    assert difference(data, values) == 0


def test_a_jpeg_has_the_pixels_that_training_sees(tmp_path: Path) -> None:
    data = encode(np.random.default_rng(1).integers(0, 255, (37, 53, 3)).astype(np.uint8), "JPEG")
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    assert np.array_equal(photos.read(data), bgr[..., ::-1])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a photo"),
        (b"text, not a photo", "not a photo"),
        (encode(RGB, "JPEG")[:-300], "truncated"),
        (encode(RGB, "PNG")[:-100], "truncated"),
        (encode(Image.fromarray(RGB[..., 0]).convert("F"), "TIFF"), "32-bit"),
        (encode(Image.new("1", (20_001, 5_000)), "PNG"), "at most 100 are read"),
        (encode(Image.new("1", (20_000, 10_000)), "PNG"), "at most 100 are read"),
        (b"\0\0\0\x18ftypheic" + bytes(50), "is not a photo|damaged"),
    ],
)
def test_what_is_refused_names_the_file(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "my photo.jpg"
    path.write_bytes(data)
    with pytest.raises(PipelineError, match=message) as raised:
        photos.read(path)
    assert raised.value.lines[0].startswith(f"{path}: ")
    assert len(raised.value.lines) == 1


PLAIN = [
    ("RGB", "JPEG", {"quality": 75}),
    ("RGB", "JPEG", {"quality": 95, "subsampling": 0, "progressive": True}),
    ("L", "JPEG", {}),
    ("RGB", "PNG", {}),
    ("L", "PNG", {}),
    ("P", "PNG", {}),
]


@pytest.mark.parametrize(("mode", "form", "options"), PLAIN)
def test_both_decoders_return_the_same_bytes(
    mode: str, form: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain files take the short way through OpenCV; the same pixels with EXIF data take the other."""
    noise = np.random.default_rng(2).integers(0, 255, (37, 53, 3)).astype(np.uint8)
    picture = Image.fromarray(noise).quantize(64) if mode == "P" else Image.fromarray(noise).convert(mode)
    data = encode(picture, form, **options)
    with Image.open(BytesIO(data)) as decoded:
        expected = np.asarray(decoded.convert("RGB"))
    assert np.array_equal(photos.read(data), expected)
    exif = Image.Exif()
    exif[0x112] = 1
    assert np.array_equal(photos.read(encode(picture, form, exif=exif.tobytes(), **options)), expected)
    monkeypatch.setattr(photos, "opened", None)  # Pillow
    assert np.array_equal(photos.decode(data), expected)


@pytest.mark.parametrize("part", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "HEIF"])
def test_every_format_is_refused_if_it_is_cut(form: str, part: float) -> None:
    data = encode(RGB, form)
    with pytest.raises(InvalidFile, match="copy"):
        photos.examine(data[: int(part * len(data))])


def test_only_the_formats_of_photos_are_opened() -> None:
    """Pillow would start Ghostscript for this one."""
    with pytest.raises(InvalidFile, match="not a photo of a known format"):
        photos.examine(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


def test_damaged_exif_data_count_as_none() -> None:
    for exif in (b"Exif\0\0II*\0" + b"\xff" * 40, b"Exif\0\0", b"nonsense"):
        assert difference(encode(RGB, "JPEG", quality=95, exif=exif)) < 4


def test_what_a_file_is() -> None:
    pages: dict[str, Any] = {"save_all": True, "append_images": [Image.fromarray(RGB[::-1])]}
    for form, frames in (("TIFF", 2), ("GIF", 2), ("MPO", 1)):
        photo = photos.examine(encode(RGB, form, **pages))
        assert (photo.form, photo.frames) == ("JPEG" if form == "MPO" else form, frames)
    exif = Image.Exif()
    for orientation in TURNS:
        exif[0x112] = orientation
        photo = photos.examine(encode(TURNS[orientation](RGB), "JPEG", exif=exif.tobytes()))
        assert photo.orientation == orientation
        assert photo.stored_size == TURNS[orientation](RGB).shape[:2]


def test_heic_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(PipelineError, match=r"pip install 'wsss\[photos\]'"):
        photos.read(encode(RGB, "HEIF"))


def test_arrays() -> None:
    assert np.array_equal(photos.from_pixels(RGB), RGB)
    assert np.array_equal(photos.from_pixels(np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)])), RGB)
    assert np.array_equal(photos.from_pixels(RGB[..., 0]), np.dstack([RGB[..., 0]] * 3))
    assert np.array_equal(photos.from_pixels(RGB.astype(np.uint16)), RGB)
    for wrong in (RGB[None], RGB.astype(np.float32), RGB[:0], RGB[..., :2]):
        with pytest.raises(ValueError, match="a photo is"):
            photos.from_pixels(wrong)
