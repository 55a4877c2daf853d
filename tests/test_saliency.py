"""The saliency stage: every kind of source, and the inputs it refuses."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as Picture

from pipeline.config.dataset import Saliency
from pipeline.data.index import write
from pipeline.errors import PipelineError
from pipeline.labels import saliency
from pipeline.labels.saliency import detect
from pipeline.runtime import Runtime
from pipeline.stores.raster import RasterStore, RasterWriter
from pipeline.workflow.graph import Job
from pipeline.workflow.stage import Work
from stages.saliency import main

SIZES = {"a": (40, 60), "b": (50, 30), "c": (40, 60)}


def disc(height: int, width: int) -> NDArray[np.bool_]:
    y, x = np.mgrid[:height, :width]
    return np.asarray((y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(height, width) / 4) ** 2)


def scene(height: int, width: int) -> NDArray[np.uint8]:
    """A bright, striped disc in the centre of a grey image."""
    image = np.full((height, width, 3), 128, np.uint8)
    inside = disc(height, width)
    stripes = np.arange(width) // 3 % 2 == 0
    image[inside & stripes] = 220, 60, 40
    image[inside & ~stripes] = 250, 210, 60
    return image


def grey(path: Path) -> NDArray[np.uint8]:
    return np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), np.uint8)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Images a, b, c with grey saliency maps of constant 10, 20, 30."""
    images: dict[str, Any] = {}
    (tmp_path / "Saliency").mkdir()
    for number, (name, size) in enumerate(SIZES.items(), 1):
        cv2.imwrite(str(tmp_path / f"{name}.png"), cv2.cvtColor(scene(*size), cv2.COLOR_RGB2BGR))
        path = tmp_path / f"Saliency/{name}.png"
        cv2.imwrite(str(path), np.full(size, 10 * number, np.uint8))
        images[name] = {"file": f"{name}.png", "height": size[0], "width": size[1], "tags": [1]}
        images[name] |= {"mask": None, "saliency": str(path)}
    index = {"classes": ["disc"], "tag_source": "test", "splits": {"train": list(SIZES), "evaluation": []}}
    write(tmp_path / "index.json", {**index, "root": str(tmp_path), "images": images})
    return tmp_path


def run(root: Path, settings: Saliency, workers: int = 0) -> RasterStore:
    inputs = {"index": root / "index.json"}
    if settings.kind == "store":
        inputs["store"] = Path(str(settings.path))
    outputs = {"maps": root / "maps.h5"}
    job = Job("saliency", "", inputs, outputs, {}, settings)
    main(Work(job, inputs, outputs, Runtime(workers=workers), "key", root / "parts"))
    return RasterStore(outputs["maps"])


def test_folder(dataset: Path) -> None:
    store = run(dataset, Saliency("folder", str(dataset / "Saliency")))
    assert store.kind == "saliency"
    assert list(store) == ["a", "b", "c"]
    for number, (name, size) in enumerate(SIZES.items(), 1):
        assert np.array_equal(store.get(name), np.full(size, 10 * number))


def test_folder_names_every_invalid_map(dataset: Path) -> None:
    cv2.imwrite(str(dataset / "Saliency/a.png"), np.zeros((40, 60, 3), np.uint8))
    cv2.imwrite(str(dataset / "Saliency/b.png"), np.zeros((30, 50), np.uint8))
    cv2.imwrite(str(dataset / "Saliency/c.png"), np.zeros((40, 60), np.uint16))
    with pytest.raises(PipelineError) as caught:
        run(dataset, Saliency("folder", str(dataset / "Saliency")))
    first, second, third = caught.value.lines
    assert "a.png" in first
    assert "RGB" in first
    assert "b.png: is 50x30, but its image is 30x50" in second
    assert "c.png" in third
    assert "16-bit" in third


def test_folder_names_missing_maps(dataset: Path) -> None:
    (dataset / "Saliency/a.png").unlink()
    (dataset / "Saliency/c.png").unlink()
    with pytest.raises(PipelineError, match="no saliency map of 2 images: a, c; add them"):
        run(dataset, Saliency("folder", str(dataset / "Saliency")))


def test_folder_refuses_a_map_changed_since_it_was_indexed(dataset: Path) -> None:
    index = json.loads((dataset / "index.json").read_text())
    index["images"]["b"]["saliency_sha256"] = "0" * 64
    write(dataset / "index.json", index)
    with pytest.raises(PipelineError, match=r"b\.png: changed since it was indexed"):
        run(dataset, Saliency("folder", str(dataset / "Saliency")))


def users_store(path: Path, sizes: dict[str, tuple[int, int]]) -> Saliency:
    with RasterWriter(path, "saliency") as writer:
        for name, size in sizes.items():
            writer.append(name, np.full(size, ord(name[0]), np.uint8))
    return Saliency("store", str(path))


def test_store_in_any_order(dataset: Path) -> None:
    store = run(dataset, users_store(dataset / "own.h5", dict(reversed([*SIZES.items(), ("z", (2, 2))]))))
    assert list(store) == ["a", "b", "c"]
    assert np.array_equal(store.get("b"), np.full(SIZES["b"], ord("b")))


def test_store_of_other_sizes_is_refused(dataset: Path) -> None:
    with pytest.raises(PipelineError, match=r"own\.h5: image b: is 50x30, but its image is 30x50"):
        run(dataset, users_store(dataset / "own.h5", {**SIZES, "b": (30, 50)}))


def test_store_names_twenty_of_the_missing(dataset: Path) -> None:
    index = json.loads((dataset / "index.json").read_text())
    index["images"] |= {f"x{number:02d}": index["images"]["a"] for number in range(25)}
    index["splits"]["train"] = list(index["images"])
    write(dataset / "index.json", index)
    with pytest.raises(PipelineError, match=r"no saliency map of 25 images: x00, x01, .*, x19 and 5 more;"):
        run(dataset, users_store(dataset / "own.h5", SIZES))


@pytest.mark.parametrize("kind", ["spectral_residual", "fine_grained"])
def test_detectors_find_the_disc(dataset: Path, kind: Any) -> None:
    store = run(dataset, Saliency(kind))
    for name, (height, width) in SIZES.items():
        found = store.get(name).astype(int)
        assert found.shape == (height, width)
        assert (found.min(), found.max()) == (0, 255)
        inside = disc(height, width)
        assert found[inside].mean() > 2 * found[~inside].mean()
        assert found[[0, 0, -1, -1], [0, -1, 0, -1]].max() < 100


def test_processes_give_the_same_store(dataset: Path) -> None:
    alone = run(dataset, Saliency("fine_grained")).path.read_bytes()
    for part in (dataset / "parts").iterdir():
        part.unlink()
    assert run(dataset, Saliency("fine_grained"), workers=2).path.read_bytes() == alone


def test_a_uniform_image_has_no_saliency() -> None:
    assert not detect(np.full((20, 30, 3), 90, np.uint8), "fine_grained").any()


def test_none_names_the_images(dataset: Path) -> None:
    store = run(dataset, Saliency("none"))
    assert list(store) == ["a", "b", "c"]
    assert len(store) == 0


def test_opencv_without_saliency_is_a_one_line_error(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cv2, "saliency")
    with pytest.raises(PipelineError, match="pip install opencv-contrib-python-headless") as caught:
        run(dataset, Saliency("spectral_residual"))
    assert len(caught.value.lines) == 1


def test_voc_sized_maps_from_the_users_folder(tmp_path: Path) -> None:
    root = Path("../shared/data/voc12_mini")
    if not root.is_dir():
        pytest.skip("../shared/data/voc12_mini is not here")
    files = sorted((root / "Saliency").glob("*.png"))[:3]
    images = {}
    for file in files:
        height, width = grey(file).shape
        images[file.stem] = {"file": f"JPEGImages/{file.stem}.jpg", "height": height, "width": width, "tags": [1]}
        images[file.stem] |= {"mask": None, "saliency": str(file)}
    index = {"classes": ["object"], "tag_source": "test", "splits": {"train": list(images), "evaluation": []}}
    write(tmp_path / "index.json", {**index, "root": str(root), "images": images})
    given = run(tmp_path, Saliency("folder", str(root / "Saliency")))
    assert list(given) == [file.stem for file in files]
    assert np.array_equal(given.get(next(iter(given))), grey(files[0]))


def test_rembg_finds_objects_and_says_what_it_lacks(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package, which downloads its network: the interface is that of rembg 2."""
    monkeypatch.setitem(sys.modules, "rembg", None)
    saliency.u2net.cache_clear()
    with pytest.raises(PipelineError, match=r"rembg is not installed; pip install 'rembg\[cpu\]'"):
        saliency.u2net()
    stand_in = types.ModuleType("rembg")

    def no_network(name: str) -> object:
        raise ConnectionError("no route\nto host")

    stand_in.new_session = no_network  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rembg", stand_in)
    with pytest.raises(PipelineError, match=r"cannot load u2net.onnx \(no route to host\)"):
        saliency.u2net()
    stand_in.new_session = lambda name: name  # type: ignore[attr-defined]

    def remove(picture: Picture.Image, session: str, only_mask: bool) -> Picture.Image:
        assert (session, only_mask) == ("u2net", True)
        return picture.convert("L")

    stand_in.remove = remove  # type: ignore[attr-defined]
    assert np.array_equal(saliency.salient_objects(np.full((4, 6, 3), 90, np.uint8)), np.full((4, 6), 90))
    store = run(dataset, Saliency("rembg"))
    assert {name: store.get(name).shape for name in SIZES} == SIZES
    saliency.u2net.cache_clear()
