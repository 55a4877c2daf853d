"""The index and the ground truth: their contents, and every fault of a dataset."""

import hashlib
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.config.dataset import Dataset
from pipeline.data.build_index import build_index
from pipeline.data.checks import mask_values
from pipeline.data.complete import InvalidFile
from pipeline.data.index import Index, write
from pipeline.errors import PipelineError
from pipeline.runtime import Runtime
from pipeline.stores.raster import RasterStore
from pipeline.workflow.graph import Job
from pipeline.workflow.stage import execute
from stages import ground_truth
from tests.voc_tree import CLASSES, LISTS, image_of, image_size, make_index, make_tree, minimal_params, write_mask

REPOSITORY = Path(__file__).parent.parent
PIXELS = 10**6  # a limit that no file here reaches
FULL_SIZE = Path("../shared/data/voc12_fullsize_48")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_tree(tmp_path / "voc")


def lines(dataset: Dataset, saliency: Path | None = None) -> list[str]:
    """Return the faults of an invalid dataset."""
    with pytest.raises(PipelineError) as caught:
        build_index(dataset, saliency, threads=2)
    return list(caught.value.lines)


def edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


def test_a_valid_dataset(tmp_path: Path) -> None:
    root = tmp_path / "voc"
    index = Index(make_index(root, train=3, evaluation=2, size=(20, 30)))
    assert index.classes == list(CLASSES)
    assert index.tag_source == "tags.json (JSON {id: [class]})"
    assert list(index.images("train").ids) == ["img_000", "img_001", "img_002"]
    assert list(index.images("evaluation").ids) == ["img_003", "img_004"]
    assert len(index.images()) == 5
    image = image_of(index, "img_001")
    assert (image.height, image.width, image.tags) == (20, 30, (2, 3))
    files = ((image.file, image.sha256), (image.mask, image.mask_sha256), (image.saliency, image.saliency_sha256))
    for folder, (file, sha256) in zip(("JPEGImages", "SegmentationClass", "Saliency"), files, strict=True):
        assert file is not None
        assert file.parent == root / folder
        assert sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_index_is_the_same_whatever_the_threads_and_another_after_a_change(dataset: Dataset) -> None:
    first = build_index(dataset, threads=1)
    assert build_index(dataset, threads=3) == first
    image = Path(dataset.root) / "JPEGImages/img_000.jpg"
    data = image.read_bytes()
    image.write_bytes(data[:15] + bytes([data[15] ^ 1]) + data[16:])  # density field of the header
    assert build_index(dataset).index != first


def test_training_images_need_no_masks_and_psa_lists_are_read(dataset: Dataset) -> None:
    root = Path(dataset.root)
    (root / "SegmentationClass/img_000.png").unlink()
    edit(root / LISTS / "train.txt", lambda text: "".join(f"/JPEGImages/{i}.jpg /x/{i}.png\n" for i in text.split()))
    images = build_index(dataset).index["images"]
    assert images["img_000"]["mask"] is None
    assert images["img_000"]["mask_sha256"] is None
    assert images["img_001"]["mask"] == "SegmentationClass/img_001.png"
    assert build_index(replace(dataset, masks=None)).index["images"]["img_005"]["mask"] is None


def test_evaluation_images_may_all_lack_tags_and_saliency(dataset: Dataset) -> None:
    root = Path(dataset.root)
    edit(root / "tags.json", lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k < "img_004"}))
    for name in ("img_004", "img_005"):
        (root / f"Saliency/{name}.png").unlink()
    images = build_index(dataset, root / "Saliency").index["images"]
    assert images["img_004"]["tags"] == []
    assert images["img_004"]["saliency"] is None
    assert images["img_003"]["saliency"] == f"{root}/Saliency/img_003.png"


def test_grey_masks_and_png_images_are_read(dataset: Dataset) -> None:
    root = Path(dataset.root)
    mask = root / "SegmentationClass/img_000.png"
    cv2.imwrite(str(mask), mask_values(mask.read_bytes(), PIXELS))
    jpeg = root / "JPEGImages/img_000.jpg"
    cv2.imwrite(str(jpeg.with_suffix(".PNG")), cv2.imread(str(jpeg)))
    jpeg.unlink()
    assert build_index(dataset).index["images"]["img_000"]["file"] == "JPEGImages/img_000.PNG"


def rgb(root: Path) -> None:
    Image.open(root / "SegmentationClass/img_004.png").convert("RGB").save(root / "SegmentationClass/img_004.png")


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: int(len(data) * keep)])

    return change


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    return lambda root: edit(root / name, lambda text: text.replace(old, new))


def masked(height: int, width: int, value: int) -> Callable[[Path], None]:
    return lambda root: write_mask(root / "SegmentationClass/img_001.png", np.full((height, width), value))


def grey(height: int, width: int) -> Callable[[Path], None]:
    return lambda root: Image.new("L", (width, height)).save(root / "Saliency/img_002.png")


TRAIN, VAL = f"{LISTS}/train.txt", f"{LISTS}/val.txt"
IMAGE, MASK, MAP = "JPEGImages/img_000.jpg", "SegmentationClass/img_005.png", "Saliency/img_002.png"
FAULTS: list[tuple[Callable[[Path], Any], str, str]] = [
    (
        lambda root: (root / IMAGE).unlink(),
        IMAGE,
        "(or another format): missing, but it is listed; add it or unlist it",
    ),
    (cut(IMAGE, 0.6), IMAGE, "truncated JPEG; copy or download it again"),
    (cut(IMAGE, 0.999), IMAGE, "truncated JPEG; copy or download it again"),
    (cut(IMAGE, 0), IMAGE, "is not a photo of a known format; save it"),
    (lambda root: (root / IMAGE).write_bytes(b"\xff\xd8\xff\xd9"), IMAGE, "damaged JPEG, which cannot be decoded"),
    (
        lambda root: (root / IMAGE).write_text("<html>"),
        IMAGE,
        "is not a photo of a known format; save it as JPEG or PNG",
    ),
    (
        lambda root: (root / IMAGE.replace("jpg", "png")).touch(),
        IMAGE,
        "img_000.png has the same id; remove",
    ),
    (lambda root: (root / MASK).unlink(), MASK, "missing, but it is an evaluation image; add it or unlist it"),
    (cut(MASK, 0.7), MASK, "truncated or damaged PNG"),
    (rgb, "SegmentationClass/img_004.png", "its pixels are RGB colours; save it as a palette or grey PNG of class ids"),
    (masked(24, 31, 1), "SegmentationClass/img_001.png", "is 31x24, but its image is 32x24; make them equal"),
    (masked(24, 32, 4), "SegmentationClass/img_001.png", "has the values 4, but class ids are 0..3 and 255 (ignore)"),
    (lambda root: (root / MAP).unlink(), MAP, "missing; add it, or choose another saliency.kind"),
    (grey(32, 24), MAP, "is 24x32, but its image is 32x24; make them equal"),
    (lambda root: write_mask(root / MAP, np.zeros((24, 32))), MAP, "palette indices; save it as a grey 8-bit PNG"),
    (replaced("tags.json", '"img_001": [2, 3]', '"img_001": ["dgo"]'), "tags.json", "tag 'dgo'; did you mean dog?"),
    (replaced("tags.json", '"img_001": [2, 3]', '"img_001": [2, 4]'), "tags.json", "class id 4, but ids are 1..3 here"),
    (lambda root: (root / "tags.json").write_text("{}"), "tags.json", "tags no listed image; correct dataset.tags"),
    (replaced("tags.json", '"img_001"', '"other"'), "tags.json", "has no entry for img_001; tag it or unlist it"),
    (replaced("tags.json", '"img_005"', '"other"'), "tags.json", "has no entry for img_005; tag it or unlist it"),
    (replaced(TRAIN, "img_001", "img_000"), TRAIN, "img_000 is listed twice (lines 1 and 2)"),
    (replaced(TRAIN, "img_001", "img_005"), TRAIN, "img_005 is also in"),
    (lambda root: (root / VAL).unlink(), VAL, "cannot be read as image list (No such file"),
    (replaced("classes.txt", "dog", "background"), "classes.txt", "names background, which is always class 0"),
    (replaced("classes.txt", "dog", "cat"), "classes.txt", "names cat more than once; remove the duplicates"),
    (lambda root: (root / "classes.txt").unlink(), "classes.txt", "write one class name a line, or set"),
    (lambda root: (root / "Saliency").rename(root / "S"), "Saliency", "create it or correct saliency.path"),
]


@pytest.mark.parametrize(("change", "file", "said"), FAULTS, ids=[said for _, _, said in FAULTS])
def test_one_fault_is_one_line(dataset: Dataset, change: Callable[[Path], Any], file: str, said: str) -> None:
    root = Path(dataset.root)
    build_index(dataset, root / "Saliency")
    change(root)
    (line,) = lines(dataset, root / "Saliency")
    assert line.startswith(str(root / file))
    assert said in line
    assert "\n" not in line


def test_missing_folders_are_one_line_each(dataset: Dataset) -> None:
    found = lines(replace(dataset, images="Images", masks="Masks"), Path("no/maps"))
    assert found == [
        f"{dataset.root}/Images: cannot be listed (No such file or directory); create it or correct dataset.images",
        f"{dataset.root}/Masks: cannot be listed (No such file or directory); create it or correct dataset.masks",
        "no/maps: cannot be listed (No such file or directory); create it or correct saliency.path",
    ]


def test_many_faults_of_a_kind_are_summed_up(tmp_path: Path) -> None:
    dataset = make_tree(tmp_path, train=30, evaluation=1, size=(8, 8))
    for image in sorted((tmp_path / "JPEGImages").iterdir())[:27]:
        image.unlink()
    found = lines(dataset)
    assert len(found) == 21
    assert found[-1] == "... and 7 more of this kind (missing image)"


def test_every_truncation_of_a_jpeg_is_refused_but_trailing_bytes_pass(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    for options in ([], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1], [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]):
        cv2.imwrite(str(path), noise, options)
        data = path.read_bytes()
        thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + 64) + data[:62] + b"\xff\xd9"  # contains an end marker
        data = data[:2] + thumbnail + data[2:]
        assert image_size(data, PIXELS) == (40, 60)
        assert image_size(data + bytes(100), PIXELS) == (40, 60)
        for length in range(2, len(data)):
            with pytest.raises(InvalidFile):
                image_size(data[:length], PIXELS)
            with pytest.raises(InvalidFile):
                image_size(data[:length] + bytes(len(data) - length), PIXELS)  # zeros, as after an interrupted copy


def test_any_flipped_bit_of_a_png_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    write_mask(path, np.eye(5))
    data = path.read_bytes()
    assert mask_values(data, PIXELS).tolist() == np.eye(5).tolist()
    for position in range(len(data)):
        with pytest.raises(InvalidFile):
            mask_values(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :], PIXELS)
    for length in range(len(data)):
        with pytest.raises(InvalidFile):
            mask_values(data[:length], PIXELS)


@pytest.mark.parametrize("side", [4, 100_000])
def test_a_png_with_valid_checksums_and_broken_pixels_is_refused(side: int) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(7))) + chunk(b"IEND", b"")
    with pytest.raises(InvalidFile, match="damaged"):
        mask_values(data, side**2)
    with pytest.raises(InvalidFile, match="damaged"):
        image_size(data, side**2)


@pytest.mark.skipif(not FULL_SIZE.is_dir(), reason=f"no VOC images at {FULL_SIZE}")
def test_real_images_and_masks_pass() -> None:
    for path in sorted((FULL_SIZE / "JPEGImages").iterdir()):
        size = image_size(path.read_bytes(), PIXELS)
        mask = mask_values((FULL_SIZE / "SegmentationClass" / f"{path.stem}.png").read_bytes(), PIXELS)
        assert mask.shape == size
        assert {*np.unique(mask)} <= {*range(21), 255}


def stage(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a stage as a command in ``folder``, which mimics the repository."""
    for room in ("pipeline", "stages"):
        if not (folder / room).exists():
            (folder / room).symlink_to(REPOSITORY / room)
    command = [sys.executable, "-m", f"stages.{name}", *arguments]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_stages_as_commands(tmp_path: Path) -> None:
    """All faults are shown with exit status 1; once fixed, the stage succeeds; a second run does nothing."""
    dataset = replace(make_tree(tmp_path / "voc"), root="voc")
    params = tmp_path / "params.json"
    params.write_text(json.dumps(minimal_params(dataset, Path("voc/Saliency"))))
    kept = {name: (tmp_path / "voc" / name).read_bytes() for name in (IMAGE, MAP, "tags.json")}
    cut(IMAGE, 0.5)(tmp_path / "voc")
    (tmp_path / "voc" / MAP).unlink()
    replaced("tags.json", '"img_001": [2, 3]', '"img_001": [2, "zebra"]')(tmp_path / "voc")
    failed = stage("index", tmp_path, "--params", "params.json")
    assert failed.returncode == 1
    assert failed.stderr.splitlines() == [
        "error: voc/tags.json: img_001 has the unknown tag 'zebra'; correct it, add it to dataset.classes, or leave "
        "out such classes: set dataset.other_classes to leave_out",
        f"error: voc/{MAP}: missing; add it, or choose another saliency.kind",
        f"error: voc/{IMAGE}: truncated JPEG; copy or download it again",
    ]
    assert not list(tmp_path.glob("results/**/index.json"))
    for name, data in kept.items():
        (tmp_path / "voc" / name).write_bytes(data)
    for name, output in (("index", "index.json"), ("ground_truth", "labels.h5")):
        done = stage(name, tmp_path, "--params", "params.json")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"results/test/{name}/{output}").exists()
    again = stage("index", tmp_path, "--params", "params.json")
    assert again.stdout == "index: up to date\n"


def truth(index: Path) -> Job:
    return Job(
        "ground_truth",
        "",
        {"index": index},
        {name: index.parent / f"truth/{name}.h5" for name in ("labels", "masks")},
        {},
    )


def test_ground_truth_holds_exactly_the_masks(tmp_path: Path) -> None:
    dataset = make_tree(tmp_path)
    (tmp_path / "SegmentationClass/img_001.png").unlink()
    index = tmp_path / "index.json"
    write(index, build_index(dataset).index)
    job = truth(index)
    execute(job, ground_truth.main, Runtime())
    masked = ["img_000", "img_002", "img_003", "img_004", "img_005"]
    for output, names in (("labels", masked[:3]), ("masks", masked)):  # labels.h5 holds those of training images
        store = RasterStore(job.outputs[output])
        assert store.kind == "labels"
        assert list(store) == names
        for name in names:
            with Image.open(tmp_path / f"SegmentationClass/{name}.png") as mask:
                assert np.array_equal(store.get(name), np.asarray(mask))


def test_ground_truth_refuses_masks_that_changed(tmp_path: Path) -> None:
    index = make_index(tmp_path)
    mask = image_of(Index(index), "img_002").mask
    assert mask is not None
    write_mask(mask, np.ones((24, 32)))
    (tmp_path / "SegmentationClass/img_003.png").unlink()
    with pytest.raises(PipelineError) as caught:
        execute(truth(index), ground_truth.main, Runtime())
    changed, gone = caught.value.lines
    assert changed.startswith(f"{mask}: changed since it was indexed: sha256 is ")
    assert gone.startswith(f"{tmp_path}/SegmentationClass/img_003.png: cannot be read (No such file or directory)")
    assert not truth(index).outputs["labels"].exists()


class TestFile:
    def raw(self, ids: list[str]) -> dict[str, Any]:
        entry = {"file": "a.jpg", "height": 2, "width": 3, "tags": [1], "mask": None, "saliency": None}
        splits = {"train": ids[1:], "evaluation": ids[:1]}
        return {"root": "r", "classes": ["a"], "splits": splits, "images": {name: dict(entry) for name in ids}}

    def test_it_is_json_with_one_line_per_image(self, tmp_path: Path) -> None:
        raw = self.raw(["b", "a", "c"])
        write(tmp_path / "index.json", raw)
        text = (tmp_path / "index.json").read_text()
        assert json.loads(text) == raw
        assert len(re.findall(r'^"[abc]":\t\{.*\},?$', text, re.MULTILINE)) == 3

    @pytest.mark.parametrize("name", ['"images": {', '":\t{', "\n", ",\n", "}}", "\t", "é", "\\", '\\"'])
    def test_any_id_is_kept(self, tmp_path: Path, name: str) -> None:
        write(tmp_path / "index.json", self.raw(["first", name, "last"]))
        index = Index(tmp_path / "index.json")
        assert list(index.images("train").ids) == [name, "last"]
        assert list(index.images("evaluation").ids) == ["first"]
        assert [image.id for image in index.images()] == ["first", name, "last"]

    @pytest.mark.parametrize("count", [0, 1])
    def test_a_few_images(self, tmp_path: Path, count: int) -> None:
        write(tmp_path / "index.json", self.raw(["a"][:count]))
        assert len(Index(tmp_path / "index.json")) == count

    @pytest.mark.parametrize("end", [10, -1, -5, -60])
    def test_a_file_that_was_cut_off_is_refused(self, tmp_path: Path, end: int) -> None:
        path = tmp_path / "index.json"
        write(path, self.raw(["a", "b"]))
        path.write_bytes(path.read_bytes()[:end])
        with pytest.raises(PipelineError, match=r"index\.json: not an index .*; run the index stage again"):
            Index(path)

    def test_a_damaged_line_is_named_when_it_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "index.json"
        write(path, self.raw(["a", "b"]))
        path.write_bytes(path.read_bytes().replace(b'"height": 2', b'"height"; 2'))
        with pytest.raises(PipelineError, match=r"index\.json: not an index"):
            list(Index(path).images())

    def test_images_are_a_sequence(self, tmp_path: Path) -> None:
        write(tmp_path / "index.json", self.raw(["a", "b", "c", "d"]))
        images = Index(tmp_path / "index.json").images("train")
        assert [image.id for image in images[1:]] == ["c", "d"] == list(images.ids)[1:]
        assert images[-1].id == "d"
        assert list(images.having(lambda name: name != "c").ids) == ["b", "d"]
        again = pickle.loads(pickle.dumps(images))
        assert again == images == list(images)
        with pytest.raises(IndexError):
            images[3]

    @pytest.mark.parametrize("line", ['"a", "b":\t', '"b", "b":\t', '"a":\t'])
    def test_an_id_is_on_one_line(self, tmp_path: Path, line: str) -> None:
        path = tmp_path / "index.json"
        write(path, self.raw(["a", "b"]))
        path.write_bytes(path.read_bytes().replace(b'"b":\t', line.encode()))
        with pytest.raises(PipelineError, match=r"index\.json: not an index .*an id is twice in it"):
            Index(path)

    def test_an_image_takes_few_bytes_of_memory(self, tmp_path: Path) -> None:
        ids = [f"image_{number:07d}" for number in range(20_000)]
        write(tmp_path / "index.json", self.raw(ids))
        tracemalloc.start()
        index = Index(tmp_path / "index.json")
        for image in index.images():
            assert image.height == 2
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held / len(ids) < 24  # the place of the line and its number in the split: 8 bytes each
        assert peak / len(ids) < 300
