"""The index reads the photos that people have, where they lie: any tree, name, format, depth and orientation."""

import json
import os
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image as Pillow

from pipeline.config.dataset import Dataset
from pipeline.data.build_index import Survey, build_index
from pipeline.data.checks import read_mask
from pipeline.data.images import read_rgb
from pipeline.data.index import Image, Index, write
from pipeline.data.palette import voc_palette
from pipeline.errors import PipelineError
from pipeline.labels.saliency import read_file
from pipeline.stores.raster import RasterStore
from tests.project import link_code, run_stages
from tests.test_photos import TURNS
from tests.test_tree import NAMES
from tests.trained import command
from tests.voc_tree import LISTS, image_of, make_tree, minimal_params

ODD = [
    "Urlaub 2024/Käfer 1.jpg",
    "Urlaub 2024/50% #1.JPG",
    'it\'s "quoted".png',
    "dot..jpeg",
    "-rf.bmp",
    "😀.tif",
]
WEBP = {"lossless": True}


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.chdir(tmp_path)
    return make_tree(Path("data"))


def image(dataset: Dataset, name: str = "img_000", saliency: bool = False) -> Image:
    survey = build_index(dataset, Path(dataset.root) / "Saliency" if saliency else None)
    write(Path("index.json"), survey.index)
    return image_of(Index(Path("index.json")), name)


def faults(dataset: Dataset, saliency: Path | None = None) -> tuple[str, ...]:
    with pytest.raises(PipelineError) as caught:
        build_index(dataset, saliency)
    return caught.value.lines


def pixels(name: str = "img_000") -> Any:
    return cv2.imread(f"data/JPEGImages/{name}.jpg")[..., ::-1]


def save(values: Any, path: str, **options: Any) -> None:
    """Replace the photo of img_000 by another file."""
    for old in Path("data/JPEGImages").glob("img_000.*"):
        old.unlink()
    target = Path("data/JPEGImages") / path
    Pillow.fromarray(np.ascontiguousarray(values)).save(target, **options)


def rename(names: list[str], separator: str = "/") -> None:
    """Rename the photos, masks and tags of the dataset, and list the photos by their paths as Windows does."""
    tags = list(json.loads(Path("data/tags.json").read_text()).values())
    for number, name in enumerate(names):
        stem = os.path.splitext(name)[0]
        picture = Pillow.open(f"data/JPEGImages/img_{number:03d}.jpg").convert("RGB")
        for folder, file in (("JPEGImages", name), ("SegmentationClass", f"{stem}.png"), ("Saliency", f"{stem}.png")):
            (Path("data") / folder / file).parent.mkdir(exist_ok=True, parents=True)
            if folder != "JPEGImages":
                Path(f"data/{folder}/img_{number:03d}.png").rename(Path("data") / folder / file)
        picture.save(Path("data/JPEGImages") / name)
        Path(f"data/JPEGImages/img_{number:03d}.jpg").unlink()
    stems = [os.path.splitext(name)[0] for name in names]
    Path("data/tags.json").write_text(json.dumps(dict(zip(stems, tags, strict=True))))
    lines = [f"JPEGImages/{name}".replace("/", separator) for name in names]
    for split, part in (("train", lines[:4]), ("val", lines[4:])):
        Path("data", LISTS, f"{split}.txt").write_bytes("".join(f"{line}\r\n" for line in part).encode("utf-8-sig"))


@pytest.mark.parametrize("separator", ["/", "\\"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_any_tree_of_any_names(form: str, separator: str, dataset: Dataset) -> None:
    rename([unicodedata.normalize(form, name) for name in ODD], separator)
    survey = build_index(dataset, Path("data/Saliency"))
    ids = [os.path.splitext(name)[0] for name in ODD]
    assert survey.index["splits"] == {"train": ids[:4], "evaluation": ids[4:]}
    for name, file in zip(ids, ODD, strict=True):
        entry = survey.index["images"][name]
        assert unicodedata.normalize("NFC", entry["file"]) == f"JPEGImages/{file}"
        assert entry["tags"]
        assert entry["mask_sha256"]
        assert entry["saliency_sha256"]


def test_ids_go_through_all_stages_and_exports(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    link_code(Path())
    rename(ODD)
    params = minimal_params(dataset, Path("data/Saliency"))
    Path("params.yaml").write_text(yaml.safe_dump(params))
    run_stages(["params.yaml"])
    ids = [os.path.splitext(name)[0] for name in ODD]
    assert list(RasterStore(Path("results/test/pseudo_labels/cam/labels.h5"))) == ids[:4]
    assert list(RasterStore(Path("results/test/predictions/cam/labels.h5"))) == ids[4:]
    report = Path("results/test/report.html").read_text()
    assert "it&#39;s &#34;quoted&#34;" in report or 'it&#39;s "quoted"' in report
    assert command("export", "results/test/pseudo_labels/cam/labels.h5", "--out", "out", "--formats", "png") == 0
    assert sorted(path.relative_to("out/masks").as_posix() for path in Path("out/masks").rglob("*.png")) == sorted(
        f"{name}.png" for name in ids[:4]
    )


def test_files_may_lie_anywhere(dataset: Dataset, tmp_path: Path) -> None:
    for folder in ("JPEGImages", "SegmentationClass"):
        (tmp_path / "data" / folder).rename(tmp_path / folder)
    for where in (str(tmp_path / "{}"), "../{}"):
        other = replace(dataset, images=where.format("JPEGImages"), masks=where.format("SegmentationClass"))
        seen = image(other, "img_005")
        assert seen.file.samefile(tmp_path / "JPEGImages/img_005.jpg")
        assert read_rgb(seen).shape == (*read_mask(seen).shape, 3)


LISTED = [
    ("img_000.jpg\na b.jpg\n", ["img_000", "a b"]),
    ("data/JPEGImages/deep/er/x.jpg\n/abs/JPEGImages/img_001.jpg\n", ["deep/er/x", "img_001"]),
    ("deep\\er\\x\nJPEGImages\\a b.jpg\n.\\img_001.jpg\n", ["deep/er/x", "a b", "img_001"]),
    ("x\n", ["deep/er/x"]),
    ("/JPEGImages/deep/er/x.jpg /SegmentationClass/deep/er/x.png\n", ["deep/er/x"]),
    ("a b 3 4\nimg_001 0\n", ["a b", "img_001"]),
    ("deep/er/y/z.jpg\n", ["deep/er/y/z"]),  # missing
]


@pytest.mark.parametrize(("text", "ids"), LISTED)
def test_lists_name_photos_by_ids_or_paths(text: str, ids: list[str], tmp_path: Path) -> None:
    from pipeline.data.faults import Faults
    from pipeline.data.lists import read_list

    photos = {name: f"{name}.jpg" for name in ("img_000", "img_001", "a b", "deep/er/x", "deep/z")}
    (tmp_path / "list.txt").write_text(text)
    found = Faults()
    assert read_list(tmp_path / "list.txt", found, photos) == ids
    assert not found.lines()


def test_an_ambiguous_name_is_one_line(tmp_path: Path) -> None:
    from pipeline.data.faults import Faults
    from pipeline.data.lists import read_list

    (tmp_path / "list.txt").write_text("x.jpg\n")
    found = Faults()
    read_list(tmp_path / "list.txt", found, {name: f"{name}.jpg" for name in ("a/x", "b/x")})
    (line,) = found.lines()
    assert line.startswith(f"{tmp_path}/list.txt: line 1 names x.jpg, but it may be a/x or b/x; ")


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_masks_and_maps_fit_the_photo_as_it_is_shown(suffix: str, orientation: int, dataset: Dataset) -> None:
    shown = pixels()
    exif = Pillow.Exif()
    exif[0x112] = orientation
    options = {"tiffinfo": {0x112: orientation}} if suffix == "tif" else {"exif": exif.tobytes()}
    options |= {"jpg": {"quality": 100}, "webp": WEBP}.get(suffix, {})
    save(TURNS[orientation](shown), f"img_000.{suffix}", **options)
    seen = image(dataset, saliency=True)
    assert seen.size == shown.shape[:2] == read_mask(seen).shape == read_file(seen).shape
    assert np.abs(read_rgb(seen).astype(int) - shown).mean() < 3
    survey = build_index(dataset)
    turned = [line for line in survey.census.remarks if "turned upright by their EXIF orientation" in line]
    assert len(turned) == (orientation != 1)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_that_fits_only_the_stored_view_is_named(orientation: int, dataset: Dataset) -> None:
    exif = Pillow.Exif()
    exif[0x112] = orientation
    save(pixels(), "img_000.jpg", exif=exif.tobytes())
    mask, saliency = faults(dataset, Path("data/Saliency"))
    turned = f"is 32x24, but its image is 24x32 as its EXIF orientation {orientation} turns it"
    for line, kind, folder in ((mask, "mask", "SegmentationClass"), (saliency, "saliency map", "Saliency")):
        fits = f"the {kind} fits the photo as it is stored, so turn the {kind} as the photo is shown"
        assert line == f"data/{folder}/img_000.png: {turned}; {fits}"


def test_a_large_turned_photo_is_reduced_upright(dataset: Dataset) -> None:
    exif = Pillow.Exif()
    exif[0x112] = 6
    large = cv2.resize(pixels(), (320, 240), interpolation=cv2.INTER_NEAREST)
    save(np.rot90(large, 1), "img_000.jpg", exif=exif.tobytes(), quality=95)
    mask = Pillow.open("data/SegmentationClass/img_000.png")
    mask.resize((320, 240), Pillow.Resampling.NEAREST).save("data/SegmentationClass/img_000.png")
    seen = image(replace(dataset, working_megapixels=0.01))
    assert (seen.file_size, seen.size) == ((240, 320), (86, 115))
    assert read_rgb(seen).shape[:2] == read_mask(seen).shape == seen.size
    expected = cv2.resize(large, (115, 86), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(read_rgb(seen) - expected).mean() < 6


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("jfif", {"format": "JPEG"}),
        ("JPG", {"format": "JPEG"}),
        ("png", {}),
        ("webp", WEBP),
        ("tif", {"compression": "tiff_lzw"}),
        ("tiff", {"compression": "tiff_deflate"}),
        ("bmp", {}),
        ("gif", {}),
        ("heic", {"format": "HEIF", "quality": 95}),
    ],
)
def test_formats(suffix: str, options: dict[str, Any], dataset: Dataset) -> None:
    shown = pixels()
    save(shown, f"img_000.{suffix}", **options)
    assert np.abs(read_rgb(image(dataset)).astype(int) - shown).mean() < 8
    assert not [line for line in build_index(dataset).census.remarks if "format" in line]


def test_what_is_odd_about_a_file_is_a_remark(dataset: Dataset) -> None:
    shown = pixels()
    Pillow.fromarray(shown).save("data/JPEGImages/img_000.jpg", format="GIF")
    other = Pillow.fromarray(shown[::-1])
    save_all: dict[str, Any] = {"save_all": True, "append_images": [other]}
    second = Pillow.open("data/JPEGImages/img_001.jpg").convert("RGB")
    Path("data/JPEGImages/img_001.jpg").unlink()
    second.save("data/JPEGImages/img_001.tif", **save_all)
    deep = cv2.imread("data/JPEGImages/img_002.jpg").astype(np.uint16) * 16
    Path("data/JPEGImages/img_002.jpg").unlink()
    cv2.imwrite("data/JPEGImages/img_002.png", deep)
    remarks = build_index(dataset).census.remarks
    for text in (
        "1 images have another format than their names say: img_000",
        "1 images hold several pictures, of which the first is read: img_001",
        "1 images have 16 bits a channel; the top 8 of the bits that the largest value of each needs are read: img_002",
    ):
        assert text in remarks
    assert np.array_equal(read_rgb(image(dataset, "img_001")), np.asarray(second))
    assert np.array_equal(read_rgb(image(dataset, "img_002"))[..., ::-1], deep // 16)


def test_a_listed_file_of_another_format_is_named(dataset: Dataset) -> None:
    Path("data/JPEGImages/img_000.jpg").rename("data/JPEGImages/img_000.CR2")
    (line,) = faults(dataset)
    assert line.startswith("data/JPEGImages/img_000.CR2: is listed, but of a format that is not read (jpg, jpeg, ")


def test_heic_without_its_package_is_one_line(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        shown = pixels(f"img_{number:03d}")
        Path(f"data/JPEGImages/img_{number:03d}.jpg").unlink()
        Pillow.fromarray(shown).save(f"data/JPEGImages/img_{number:03d}.heic", format="HEIF")
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    (line,) = faults(dataset)
    assert line == (
        "data/JPEGImages/img_000.heic: is HEIC; pip install 'wsss[photos]' to read it, or save it as JPEG (3 images)"
    )


def encoded(values: Any, form: str, **options: Any) -> bytes:
    buffer = BytesIO()
    values.save(buffer, form, **options)
    return buffer.getvalue()


LOSSLESS: dict[str, Callable[[Any], bytes]] = {
    "tif": lambda mask: encoded(mask, "TIFF", compression="tiff_lzw"),
    "bmp": lambda mask: encoded(mask, "BMP"),
    "gif": lambda mask: encoded(mask, "GIF", optimize=False),
    "PNG": lambda mask: encoded(Pillow.fromarray(np.asarray(mask)), "PNG"),
}


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_masks_in_lossless_formats(suffix: str, dataset: Dataset) -> None:
    path = Path("data/SegmentationClass/img_000.png")
    mask = Pillow.open(path)
    mask.load()
    path.unlink()
    path.with_suffix(f".{suffix}").write_bytes(LOSSLESS[suffix](mask))
    assert np.array_equal(read_mask(image(dataset)), np.asarray(mask))


@pytest.mark.parametrize("name", ["img_000.jpg", "img_000.JPEG", "img_000.webp", "img_005.jpg"])
def test_masks_in_lossy_formats_are_refused(name: str, dataset: Dataset) -> None:
    """Those of training images, too, which need none."""
    path = Path("data/SegmentationClass") / name
    Pillow.open(path.with_suffix(".png")).convert("L").save(path, "WEBP" if name.endswith("webp") else "JPEG")
    path.with_suffix(".png").unlink()
    (line,) = faults(dataset)
    assert line == f"{path}: is JPEG or WebP, whose lossy compression changes class ids; save the mask as PNG"


@pytest.mark.parametrize(("name", "form"), [("png", "JPEG"), ("tif", "TIFF")])
def test_lossy_masks_under_other_names_are_refused(name: str, form: str, dataset: Dataset) -> None:
    path = Path("data/SegmentationClass/img_000.png")
    mask = Pillow.open(path).convert("L")
    path.unlink()
    mask.save(path.with_suffix(f".{name}"), form, **({"compression": "jpeg"} if form == "TIFF" else {}))
    (line,) = faults(dataset)
    assert "whose lossy compression changes values; save it as a palette or grey PNG of class ids" in line


def test_palettes_beside_lossy_copies_are_read(dataset: Dataset) -> None:
    """Folders of masks often hold coloured copies for the eye."""
    mask = Pillow.open("data/SegmentationClass/img_000.png")
    mask.convert("RGB").save("data/SegmentationClass/img_000.jpg")
    assert np.array_equal(read_mask(image(dataset)), np.asarray(mask))
    assert voc_palette().shape == (256, 3)


def test_many_names_of_photos(dataset: Dataset) -> None:
    for name in NAMES:
        path = Path("data/JPEGImages") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        form = "HEIF" if name.lower().endswith(("heic", "heif")) else None
        Pillow.fromarray(np.random.default_rng(len(name)).integers(0, 255, (9, 9, 3)).astype(np.uint8)).save(path, form)
    with Path("data", LISTS, "train.txt").open("a") as file:
        file.writelines(f"{name}\n" for name in NAMES)
    tags = json.loads(Path("data/tags.json").read_text())
    Path("data/tags.json").write_text(json.dumps(tags | {name: [1] for name in NAMES}))
    survey: Survey = build_index(dataset)
    assert survey.index["splits"]["train"][4:] == [
        unicodedata.normalize("NFC", os.path.splitext(name)[0]) for name in NAMES
    ]
