"""Conversion of COCO-Stuff 10k, with a small generated folder in its layout."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.config.dataset import Dataset
from pipeline.config.params import load
from pipeline.data import matlab
from pipeline.data.build_index import build_index
from pipeline.data.coco_stuff import convert
from pipeline.data.index import Index
from pipeline.data.palette import voc_palette
from pipeline.errors import PipelineError
from pipeline.stores import manifest
from pipeline.stores.files import sha256
from pipeline.stores.raster import RasterStore
from pipeline.workflow.freshness import stale
from pipeline.workflow.graph import Graph
from pipeline.workflow.stage import run
from stages import coco_stuff, evaluation, ground_truth, index
from stages.coco_stuff import main
from tests.project import ROOT, link_code
from tests.voc_tree import minimal_params

scipy_io = pytest.importorskip("scipy.io", reason="scipy is not installed; it writes COCO-Stuff's annotations")

SOURCE, VOC = Path("coco"), Path("data/voc")
SIZE = (4, 6)
TRAIN, TEST = ["COCO_train2014_01", "COCO_train2014_02", "COCO_train2014_03"], ["COCO_train2014_04", "COCO_val_05"]
# Unlabeled, person (VOC's 15), giraffe; dog (12), tvmonitor (20), the highest stuff; truck; giraffe; sofa (18).
STUFF = {TRAIN[0]: [0, 1, 25], TRAIN[1]: [18, 72, 182], TRAIN[2]: [92, 8], TEST[0]: [25, 120], TEST[1]: [63, 0]}
WANTED = {TRAIN[0]: [255, 15, 0], TRAIN[1]: [12, 20, 0], TRAIN[2]: [0, 0], TEST[0]: [0, 0], TEST[1]: [18, 255]}
TAGS = {TRAIN[0]: [15], TRAIN[1]: [12, 20], TRAIN[2]: [], TEST[0]: [], TEST[1]: [18]}


def spread(values: list[int], dtype: Any) -> np.ndarray[Any, Any]:
    """A map of shape SIZE that cycles through ``values``."""
    return np.resize(values, SIZE).astype(dtype)


def annotate(name: str, stuff: Any) -> None:
    """Write an annotation in COCO-Stuff's format, with captions and regions besides S."""
    content = {"S": stuff, "captions": np.array(["a", "b"], object), "regionMapStuff": np.ones(SIZE, np.uint16)}
    scipy_io.savemat(SOURCE / f"annotations/{name}.mat", content, do_compression=True)


@pytest.fixture(autouse=True)
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_source()


def make_source() -> None:
    """Create COCO-Stuff in coco/ of the working folder: three training and two test images."""
    for folder in ("images", "annotations", "imageLists"):
        (SOURCE / folder).mkdir(parents=True)
    random = np.random.default_rng(0)
    for number, (name, values) in enumerate(STUFF.items()):
        pixels = random.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
        cv2.imwrite(str(SOURCE / f"images/{name}.jpg"), pixels)
        annotate(name, spread(values, [np.uint8, np.uint16, np.float64][number % 3]))
    for split, names in (("train", TRAIN), ("test", TEST)):
        (SOURCE / f"imageLists/{split}.txt").write_text("\n".join(names) + "\n")


def mask(name: str) -> Any:
    with Image.open(VOC / f"SegmentationClass/{name}.png") as picture:
        assert picture.mode == "P"
        assert picture.getpalette() == voc_palette().reshape(-1).tolist()
        return np.asarray(picture)


def read(name: str) -> list[str]:
    return (VOC / f"ImageSets/Segmentation/{name}.txt").read_text().split()


def test_creates_voc_layout_and_leaves_out_untaggable_images() -> None:
    assert convert(SOURCE, VOC) == 1
    assert read("train") == TRAIN[:2]
    assert read("val") == TEST
    assert json.loads((VOC / "tags.json").read_text()) == TAGS
    for name, values in WANTED.items():
        assert np.array_equal(mask(name), spread(values, np.uint8))
        assert os.path.samefile(VOC / f"JPEGImages/{name}.jpg", SOURCE / f"images/{name}.jpg")


def test_every_class_of_voc_has_cocos_id() -> None:
    """The ids are those of COCO's annotation files."""
    coco = (5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
    every = np.arange(24 * 8).reshape(8, 24) % 183
    cv2.imwrite(str(SOURCE / f"images/{TRAIN[0]}.jpg"), np.zeros((8, 24, 3), np.uint8))
    annotate(TRAIN[0], every)
    convert(SOURCE, VOC)
    wanted = np.zeros((8, 24))
    for voc_id, coco_id in enumerate(coco, 1):
        wanted[every == coco_id] = voc_id
    wanted[every == 0] = 255
    assert np.array_equal(mask(TRAIN[0]), wanted)


def test_images_are_copied_if_links_are_not_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    convert(SOURCE, VOC)
    before = (SOURCE / f"images/{TRAIN[0]}.jpg").read_bytes()
    monkeypatch.setattr(os, "link", refuse)
    convert(SOURCE, VOC)
    copied = VOC / f"JPEGImages/{TRAIN[0]}.jpg"
    assert copied.stat().st_nlink == 1
    assert copied.read_bytes() == (SOURCE / f"images/{TRAIN[0]}.jpg").read_bytes() == before


def damage(name: str, keep: float) -> None:
    file = SOURCE / name
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])


def first_release() -> None:
    with h5py.File(SOURCE / f"annotations/{TRAIN[0]}.mat", "w", userblock_size=512) as file:
        file["S"] = spread([1, 2], np.uint16).T


IMAGE, ANNOTATION = f"images/{TEST[0]}.jpg", f"annotations/{TEST[0]}.mat"
AGAIN = "unpack COCO-Stuff 10k v1.1 again"
FAULTS: list[tuple[Callable[[], Any], str, str]] = [
    (
        lambda: (SOURCE / "imageLists/test.txt").unlink(),
        "imageLists/test.txt",
        "cannot be read as image list (No such file or directory); correct its path in params.yaml",
    ),
    (lambda: (SOURCE / IMAGE).unlink(), IMAGE, f"missing, but listed in coco/imageLists/test.txt; {AGAIN}"),
    (
        lambda: (SOURCE / ANNOTATION).unlink(),
        ANNOTATION,
        f"missing, but listed in coco/imageLists/test.txt; {AGAIN}",
    ),
    (lambda: damage(IMAGE, 0.6), IMAGE, "truncated JPEG; copy or download it again"),
    (lambda: damage(ANNOTATION, 0.4), ANNOTATION, f"; {AGAIN}"),
    (lambda: damage(ANNOTATION, 0), ANNOTATION, f"; {AGAIN}"),
    (lambda: scipy_io.savemat(SOURCE / ANNOTATION, {"T": 1}), ANNOTATION, f"cannot be read ('S'); {AGAIN}"),
    (
        lambda: annotate(TEST[0], spread([1], np.uint8).T),
        ANNOTATION,
        f"S is 4x6, but its image is 6x4; {AGAIN}",
    ),
    (
        lambda: annotate(TEST[0], spread([1, 183, 200], np.uint8)),
        ANNOTATION,
        f"S has the values 183, 200, but classes are 0..182; {AGAIN}",
    ),
    (
        lambda: annotate(TEST[0], spread([1], np.float64) / 2),
        ANNOTATION,
        f"S has the values 0.5, but classes are 0..182; {AGAIN}",
    ),
    (
        first_release,
        f"annotations/{TRAIN[0]}.mat",
        "is from COCO-Stuff 10k v1.0, which numbers classes differently; get v1.1 instead",
    ),
]


@pytest.mark.parametrize(("change", "file", "said"), FAULTS)
def test_one_fault_is_one_line_and_no_list_is_written(change: Callable[[], Any], file: str, said: str) -> None:
    change()
    with pytest.raises(PipelineError) as caught:
        convert(SOURCE, VOC)
    (line,) = caught.value.lines
    assert line.startswith(f"coco/{file}: ")
    assert line.endswith(said)
    assert "\n" not in line
    assert not (VOC / "tags.json").exists()


def test_another_dataset_is_left_alone() -> None:
    kept = VOC / "ImageSets/Segmentation/train.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine\n")
    with pytest.raises(
        PipelineError, match=r"data/voc: holds another dataset; choose another dataset\.root, or set dataset\.coco"
    ):
        convert(SOURCE, VOC)
    assert kept.read_text() == "mine\n"


def test_without_scipy_the_error_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(matlab.importlib, "import_module", missing)
    with pytest.raises(
        PipelineError, match=r"^scipy: not installed, but COCO-Stuff's annotations are MATLAB files; run"
    ):
        convert(SOURCE, VOC)


def test_the_index_accepts_the_dataset() -> None:
    convert(SOURCE, VOC)
    found = build_index(Dataset(root=str(VOC), masks="SegmentationClass")).index
    assert found["splits"] == {"train": TRAIN[:2], "evaluation": TEST}
    assert {name: entry["tags"] for name, entry in found["images"].items()} == {
        name: tags for name, tags in TAGS.items() if name != TRAIN[2]
    }


@pytest.fixture
def raw() -> dict[str, Any]:
    """Params of a run on the converted dataset, also written to params.yaml."""
    link_code(Path())
    dataset = Dataset(root=str(VOC), masks="SegmentationClass", coco_stuff=str(SOURCE))
    params = minimal_params(dataset)
    Path("params.yaml").write_text(yaml.safe_dump(params))
    return params


def stages_behind() -> set[str]:
    return {job.label for job in stale(Graph(load([Path("params.yaml")])))}


def test_the_stages_up_to_the_scores(raw: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    saliency = VOC / "Saliency" / f"{TRAIN[0]}.png"
    saliency.parent.mkdir(parents=True)
    saliency.write_bytes(b"a person's own")
    for name, stage in (("coco_stuff", main), ("index", index.main), ("ground_truth", ground_truth.main)):
        run(name, stage, [])
    said = "coco_stuff: 1 training images without any VOC class were left out\n"
    assert said in capsys.readouterr().out
    assert saliency.read_bytes() == b"a person's own"
    assert not stages_behind() & {"coco_stuff", "index", "ground_truth"}
    images = Index(Path("results/test/index/index.json")).images("evaluation")
    assert [image.tags for image in images] == [(), (18,)]
    masks = Path("results/test/ground_truth/masks.h5")
    assert list(RasterStore(masks)) == [*TRAIN[:2], *TEST]
    predictions = Path("results/test/predictions/cam/labels.h5")
    predictions.parent.mkdir(parents=True)
    shutil.copy(masks, predictions)  # perfect predictions, also on test images without tags
    manifest.write(predictions.parent, stage="prediction cam", outputs={predictions.name: sha256(predictions)})
    run("evaluation", evaluation.main, ["predictions/cam"])
    scores = json.loads(Path("results/test/evaluation/predictions/cam/scores.json").read_text())
    assert (scores["images"], scores["miou"]) == (2, 1.0)


def test_another_source_is_converted_again_and_a_missing_one_refused(
    raw: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run("coco_stuff", main, [])
    assert "coco_stuff" not in stages_behind()
    list_ = SOURCE / "imageLists/train.txt"
    list_.write_text(TRAIN[1] + "\n")
    assert "coco_stuff" in stages_behind()
    run("coco_stuff", main, [])
    assert read("train") == TRAIN[1:2]
    shutil.rmtree(SOURCE)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("coco_stuff", main, [])
    fix = "unpack COCO-Stuff 10k v1.1 there, or correct dataset.coco_stuff"
    assert capsys.readouterr().err == f"error: coco: missing (coco_stuff of coco_stuff); {fix}\n"


@pytest.mark.parametrize("images", range(len(STUFF)))
def test_killed_it_starts_over(
    raw: dict[str, Any], images: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kill comes after any image. Until the conversion is run again, the index refuses the dataset."""

    def killed(items: Any, *_: Any) -> Any:
        for number, item in enumerate(items):
            if number == images:
                raise KeyboardInterrupt
            yield item

    for force in ([], ["--force"]):  # a first conversion, and one over a finished one
        with monkeypatch.context() as patch:
            patch.setattr(coco_stuff, "progress", killed)
            with pytest.raises(KeyboardInterrupt):
                run("coco_stuff", main, force)
        assert (VOC / "tags.json").exists() == bool(force)
        assert "coco_stuff" in stages_behind()
        with pytest.raises(SystemExit):
            run("index", index.main, ["--force"])
        line = f"error: {VOC}: is not finished; run the stage coco_stuff (again)\n"
        assert capsys.readouterr().err == line
        run("coco_stuff", main, [])
        run("index", index.main, [])
        assert not {"coco_stuff", "index"} & stages_behind()
    assert read("train") == TRAIN[:2]
    assert [np.array_equal(mask(name), spread(values, np.uint8)) for name, values in WANTED.items()] == [True] * 5
    assert sorted(path.name for path in VOC.parent.iterdir()) == [".lock-voc", "voc"]


def test_the_profile_gives_edams_rows_alone() -> None:
    files = [ROOT / "params.yaml", ROOT / "profiles/voc2012.yaml", ROOT / "profiles/coco_stuff.yaml"]
    graph = Graph(load(files))
    rows = ("edam", "edam_saliency", "supervised")
    scored = ["classifiers/edam", "localizations/edam", "pseudo_labels/edam", "pseudo_labels/edam_saliency"]
    wanted = ["coco_stuff", "index", "ground_truth", "saliency", "first_report", "report"]
    wanted += ["classifier edam", "features edam", "localization edam"]
    wanted += ["pseudo_labels edam", "pseudo_labels edam_saliency"]
    wanted += [f"{stage} {row}" for stage in ("segmentation", "prediction") for row in rows]
    wanted += [f"evaluation {name}" for name in [*scored, *(f"predictions/{row}" for row in rows)]]
    assert sorted(job.label for job in graph.jobs) == sorted(wanted)
    published = load(files[:2])
    for section in ("classifiers", "localizations", "pseudo_labels", "segmentations"):
        for name, block in getattr(graph.params, section).items():
            assert block == getattr(published, section)[name]
    assert graph.params.dataset.classes == "voc"
    assert graph.find("coco_stuff").inputs == {"coco_stuff": Path("data/cocostuff-10k-v1.1")}


def test_an_annotation_that_crashes_its_reader_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path, **options: Any) -> dict[str, Any]:
        if path.name == f"{TEST[0]}.mat":
            os.kill(os.getpid(), signal.SIGSEGV)
        return scipy_io.loadmat(path, **options)

    monkeypatch.setattr(matlab, "loader", lambda description: load)
    with pytest.raises(PipelineError) as caught:
        convert(SOURCE, VOC)
    assert caught.value.lines == (
        f"coco/{ANNOTATION}: cannot be read (damaged: reading it ended the process (SIGSEGV)); {AGAIN}",
    )
