"""The library: a model file segments photos as the prediction stage does, on any kind of photo."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import wsss
from pipeline.stores.raster import RasterStore
from pipeline.training import models
from tests.trained import MODEL, ROW, photo, train
from tests.voc_tree import CLASSES

ROOT = Path(__file__).parent.parent


def test_metadata(folder: Path, model: wsss.Model) -> None:
    assert model.classes == ("background", *CLASSES)
    assert model.test.scales == (1.0, 0.75)
    provenance = model.metadata["provenance"]
    assert (provenance["experiment"], provenance["row"], provenance["seed"]) == ("test", ROW, 0)
    training = json.loads(Path(f"results/test/segmentations/{ROW}/manifest.json").read_text())
    assert (provenance["code"], provenance["versions"]) == (training["code"], training["versions"])
    assert model.metadata["settings"]["network"].keys() == {"deeplab_largefov"}
    assert model.metadata["normalisation"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    with safe_open(MODEL, "pt") as file:
        assert list(file.metadata()) == ["wsss"]


def test_masks_are_those_of_the_prediction_stage(folder: Path, model: wsss.Model) -> None:
    store = RasterStore(MODEL.parent / "labels.h5")
    seen = set()
    for name in store:
        result = model.predict(f"data/JPEGImages/{name}.jpg")
        assert np.array_equal(result.mask, store.get(name))
        assert np.array_equal(result.mask, result.probabilities.argmax(0))
        assert np.allclose(result.probabilities.sum(0), 1, atol=1e-5)
        seen |= set(result.names)
    assert len(seen) > 1  # the network has learned something


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_segments_as_the_cpu_does(folder: Path, model: wsss.Model) -> None:
    """One photo at a time, and in batches; in bf16 if the GPU has it, which changes 0.06 % of the pixels on a CPU."""
    there = wsss.load(MODEL, "cuda")
    assert {value.device.type for value in there.network.state_dict().values()} == {"cuda"}
    photos = [*sorted(map(str, Path("data/JPEGImages").glob("*.jpg"))), photo(Path("odd.png"), size=(31, 90))]
    expected = [model.predict(path) for path in photos]
    for found in ([there.predict(path) for path in photos], there.predict_batch(photos)):
        for one, other in zip(found, expected, strict=True):
            assert one.probabilities.shape == other.probabilities.shape
            assert np.abs(one.probabilities - other.probabilities).max() < 0.05
        equal = np.concatenate([(one.mask == other.mask).ravel() for one, other in zip(found, expected, strict=True)])
        assert equal.mean() > 0.99


def test_all_forms_of_a_photo_and_of_a_call_agree(folder: Path, model: wsss.Model) -> None:
    path = Path("data/JPEGImages/img_011.jpg")
    with Image.open(path) as picture:
        forms = [path, str(path), path.read_bytes(), np.asarray(picture), picture.copy()]
    first, *others = [model.predict(form) for form in forms]
    for other in others:
        assert np.array_equal(first.mask, other.mask)
        assert np.array_equal(first.scores, other.scores)
    paths = [Path(f"data/JPEGImages/img_0{number}.jpg") for number in (10, 11, 12, 13)]
    odd = photo(Path("odd.png"), size=(31, 90))
    tags = [None, ["cat"], None, [], ["Dog "]]
    single = [model.predict(path, names) for path, names in zip([*paths, odd], tags, strict=True)]
    for results in (model.predict_batch([*paths, odd], tags), list(model.predict_stream([*paths, odd], iter(tags)))):
        for one, other in zip(single, results, strict=True):
            assert np.array_equal(one.mask, other.mask)
            assert np.allclose(one.scores, other.scores, atol=1e-6)


def test_tags_bar_other_classes(folder: Path, model: wsss.Model) -> None:
    path = "data/JPEGImages/img_011.jpg"
    assert set(model.predict(path, ["DOG"]).names) <= {"dog"}
    nothing = model.predict(path, [])
    assert nothing.names == []
    assert nothing.score == pytest.approx(1)
    both = model.predict(path, ["dog", "cat"])
    assert (both.scores[3] == 0).all()
    assert np.allclose(both.scores.sum(0), 1, atol=1e-5)
    with pytest.raises(
        wsss.PipelineError, match=r"tag 'dgo': is not a class of the model; did you mean dog\?"
    ) as raised:
        model.predict(path, ["dgo", "unicorn"])
    assert len(raised.value.lines) == 2
    with pytest.raises(ValueError, match="a list of names"):
        model.predict(path, "dog")


def test_confidence_is_the_mean_probability_of_a_class_on_its_pixels(folder: Path, model: wsss.Model) -> None:
    result = model.predict("data/JPEGImages/img_011.jpg")
    best = result.probabilities.max(0)
    assert result.confidence.keys() == set(np.unique(result.mask).tolist())
    for number, confidence in result.confidence.items():
        assert confidence == pytest.approx(best[result.mask == number].mean(), abs=1e-5)
    assert result.score == pytest.approx(best.mean(), abs=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (70, 1), (200, 30)])
def test_photos_of_any_size(model: wsss.Model, size: tuple[int, int]) -> None:
    assert model.predict(np.zeros((*size, 3), np.uint8)).mask.shape == size


def test_a_large_photo_is_reduced_for_the_network_and_its_mask_has_the_size_of_the_photo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = train(tmp_path, monkeypatch, megapixels=0.001)
    model = wsss.load(path)
    store = RasterStore(path.parent / "labels.h5")
    for name in store:
        result = model.predict(f"data/JPEGImages/{name}.jpg")
        assert np.array_equal(result.scores.argmax(0), store.get(name))
        assert result.scores.shape == (4, 25, 38)
        assert result.mask.shape == (45, 67)
        assert np.array_equal(result.mask, result.probabilities.argmax(0))
    assert wsss.load(path, megapixels=1).predict("data/JPEGImages/img_011.jpg").scores.shape == (4, 45, 67)


def test_crf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = train(tmp_path, monkeypatch, crf={"iterations": 3})
    model, plain = wsss.load(path), wsss.load(path, crf=False)
    store = RasterStore(path.parent / "labels.h5")
    photos = [f"data/JPEGImages/{name}.jpg" for name in store]
    masks = [model.predict(photo).mask for photo in photos]
    assert all(np.array_equal(one, store.get(name)) for one, name in zip(masks, store, strict=True))
    assert any((one != plain.predict(photo).mask).any() for one, photo in zip(masks, photos, strict=True))
    assert set(model.predict(photos[0], ["cat"]).names) <= {"cat"}


def test_equal_models_give_equal_files(folder: Path) -> None:
    from pipeline.inference import model_file

    content = wsss.load(MODEL)
    for name in ("a", "b"):
        source = Path(f"results/test/segmentations/{ROW}/model.pt")
        model_file.write(Path(name), source, CLASSES, content.test, 2.5, content.metadata["provenance"])
    assert Path("a").read_bytes() == Path("b").read_bytes() == MODEL.read_bytes()


def test_what_is_not_a_model_is_refused_in_one_line(folder: Path) -> None:
    from safetensors.torch import save_file

    state = models.load_model(Path(f"results/test/segmentations/{ROW}/model.pt"))["state"]
    save_file(state, "other.safetensors")
    save_file(state, "newer.safetensors", {"wsss": json.dumps({"format": 2})})
    Path("cut.safetensors").write_bytes(MODEL.read_bytes()[:-10])
    Path("text.safetensors").write_text("text")
    for name, message in {
        "no": "no such file",
        "other": "not a model file of wsss",
        "newer": "has format 2",
        "cut": "damaged",
        "text": "not a safetensors file",
    }.items():
        with pytest.raises(wsss.PipelineError, match=message) as raised:
            wsss.load(f"{name}.safetensors")
        assert raised.value.lines[0].startswith(f"{name}.safetensors: ")


def test_a_device_that_does_not_exist(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(wsss.PipelineError, match="device abacus"):
        wsss.load(MODEL, "abacus")
    for count, device, fix in (
        (0, "cuda", "this torch sees no CUDA device; use cpu"),
        (2, "cuda:2", "the GPUs are cuda:0 to cuda:1"),
    ):
        monkeypatch.setattr("torch.cuda.device_count", partial(int, count))
        with pytest.raises(wsss.PipelineError, match=f"device {device}: {fix}"):
            wsss.load(MODEL, device)
