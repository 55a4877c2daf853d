"""``wsss export``: the masks of a row, and the content of stores."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import wsss
from pipeline.config.dataset import Dataset
from pipeline.data import photos
from pipeline.data.build_index import build_index
from pipeline.data.index import Index, write
from pipeline.stores.raster import RasterStore, RasterWriter
from tests.trained import MODEL, ROW, command, mask
from tests.voc_tree import CLASSES

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("target", [f"test/{ROW}", f"results/test/{ROW}", f"results/test/predictions/{ROW}"])
def test_export_of_a_row(folder: Path, model: wsss.Model, target: str) -> None:
    assert command("export", target, "--out", "out", "--formats", "png,csv,labelstudio") == 0
    store = RasterStore(MODEL.parent / "labels.h5")
    tags = json.loads(Path("data/tags.json").read_text())
    for name, ids in tags.items():
        names = [CLASSES[number - 1] for number in ids]
        expected = model.predict(f"data/JPEGImages/{name}.jpg", names).mask
        assert np.array_equal(mask(Path(f"out/masks/{name}.png")), expected)
    assert len(json.loads(Path("out/labelstudio.json").read_text())) == len(tags)
    assert command("export", target, "--out", "out", "--use-tags", "train") == 0
    for name in tags:
        if name in store:  # an evaluation photo: the mask that was scored
            assert np.array_equal(mask(Path(f"out/masks/{name}.png")), store.get(name))


def test_photos_without_a_class_get_empty_masks(folder: Path, model: wsss.Model) -> None:
    Path("results").unlink()
    for part in ("index/index.json", str(MODEL.relative_to("results/test"))):
        Path("results/test", part).parent.mkdir(parents=True, exist_ok=True)
    experiment = Path(os.path.realpath("data")).parent / "results/test"
    Path("results/test", MODEL.relative_to("results/test")).symlink_to(experiment / MODEL.relative_to("results/test"))
    index = json.loads((experiment / "index/index.json").read_text())
    negatives = ["img_000", "img_010"]  # a training and an evaluation photo
    for name in negatives:
        index["images"][name]["tags"] = []
    write(Path("results/test/index/index.json"), index)
    assert any(model.predict(f"data/JPEGImages/{name}.jpg").mask.any() for name in negatives)
    assert command("export", f"test/{ROW}", "--out", "out") == 0
    assert not any(mask(Path(f"out/masks/{name}.png")).any() for name in negatives)
    for name in index["splits"]["evaluation"]:  # now the tags of all evaluation photos are unknown
        index["images"][name]["tags"] = []
    write(Path("results/test/index/index.json"), index)
    assert command("export", f"test/{ROW}", "--out", "out") == 0
    assert mask(Path("out/masks/img_010.png")).any()
    assert not mask(Path("out/masks/img_000.png")).any()


def test_export_reads_every_photo_that_the_dataset_accepts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one above the limit of other photos, for a dataset with a larger ``max_megapixels``."""
    limits: dict[str, int] = {}

    def read(data: bytes, name: str, limit: int) -> NDArray[np.uint8]:
        limits[Path(name).stem] = limit
        return actual(data, name, limit)

    actual = photos.read
    monkeypatch.setattr(photos, "read", read)
    monkeypatch.setattr(photos, "PIXELS", 1)
    assert command("export", f"test/{ROW}", "--out", "out") == 0
    index = Index(Path("results/test/index/index.json"))
    assert limits == {image.id: image.height * image.width for image in index.images()}


def test_export_of_a_split_and_tags(folder: Path) -> None:
    arguments = ("export", f"test/{ROW}", "--split", "evaluation", "--formats", "png")
    assert command(*arguments, "--out", "out", "--use-tags", "all") == 0
    tags = json.loads(Path("data/tags.json").read_text())
    names = {path.stem for path in Path("out/masks").iterdir()}
    assert names == {f"img_0{number}" for number in range(10, 15)}
    assert all(set(np.unique(mask(Path(f"out/masks/{name}.png")))) <= {0, *tags[name]} for name in names)


def test_export_of_an_experiment_takes_the_row_of_its_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from wsss.export import find_row

    Path("results").unlink()
    row = Path("results/mine/predictions/best")
    row.mkdir(parents=True)
    (row / "model.safetensors").touch()
    assert command("export", "mine") == 1
    assert "name one of its rows, results/mine/ROW: best" in capsys.readouterr().err
    Path("results/mine/manifest.json").write_text(json.dumps({"params": {"method": "best"}}))
    assert find_row("mine") == (Path("results/mine"), "best")
    for wrong in ("mine/other", "no", "no/best"):
        assert command("export", wrong) == 1
        assert capsys.readouterr().err.startswith(f"error: {wrong}: no such experiment or row")


def test_export_of_a_label_store(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = "results/test/ground_truth/masks.h5"
    assert command("export", path, "--out", "out", "--formats", "png,overlay,coco,cvat,labelstudio,csv") == 0
    store = RasterStore(Path(path))
    assert all(np.array_equal(mask(Path(f"out/masks/{name}.png")), store.get(name)) for name in store)
    assert (mask(Path("out/masks/img_000.png")) == 255).any()
    assert "15 images exported" in capsys.readouterr().out
    assert command("export", path, "--out", "out", "--formats", "png") == 0
    assert "0 images exported, 15 up to date" in capsys.readouterr().out
    assert command("export", path, "--out", "out", "--formats", "probabilities") == 1
    assert "has no probabilities; choose from png, overlay" in capsys.readouterr().err


def test_export_of_maps_and_what_is_no_store(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("results").unlink()
    Path("results/mine/maps").mkdir(parents=True)
    Path("results/mine/index").mkdir()
    survey = build_index(Dataset(root="data", classes="classes.txt", masks="SegmentationClass"))
    write(Path("results/mine/index/index.json"), survey.index)
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    with RasterWriter(Path("results/mine/maps/maps.h5"), "localization") as writer:
        writer.append("img_000", values, 2)
        writer.append("img_000", values[:2], 3)
    path = "results/mine/maps/maps.h5"
    assert command("export", path, "--formats", "probabilities") == 0
    out = Path("results/mine/export/maps/probabilities/img_000")
    assert np.array_equal(mask(out / "2_dog.png"), values)
    assert np.array_equal(mask(out / "3_bird.png"), values[:2])
    Path("results/mine/text.h5").write_text("no store")
    for wrong, message in {
        path: "--formats png",
        "results/mine/no.h5": "results/mine/no.h5: no such file",
        "results/mine/text.h5": "results/mine/text.h5: not a raster store",
    }.items():
        assert command("export", wrong, "--formats", "png") == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}")
        assert error.count("\n") == 1
