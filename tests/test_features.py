"""Feature maps of a classifier's layers: which modules, which images, how normalised."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config.schema import Backbone, Classifier, Head, Suppression, Training
from pipeline.data.images import read_rgb
from pipeline.data.index import Image, Index
from pipeline.data.loading import normalise, resize
from pipeline.data.sample import choose
from pipeline.inference.features import feature_maps
from pipeline.methods.base import Method
from pipeline.methods.cam import Cam
from pipeline.runtime import Runtime
from pipeline.stores.raster import RasterStore
from pipeline.training import models
from pipeline.workflow.graph import Job
from pipeline.workflow.stage import Work
from stages import features
from tests.method_contract import build_method
from tests.voc_tree import make_index

CPU = torch.device("cpu")
K = 3


def block(convs: int = 1, suppression: Suppression | None = None) -> Classifier:
    head = Head(convs, 16)
    return Classifier(Backbone("small"), Training(batch_size=2, lr=0.1, epochs=1), head=head, suppression=suppression)


def classifier(convs: int = 1, suppression: Suppression | None = None) -> Cam:
    """Untrained, with batch norms that have seen something; the same weights with and without suppression."""
    torch.manual_seed(0)
    network = build_method(block(convs, suppression), K)
    torch.manual_seed(1)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            norm.running_mean.normal_()
    assert isinstance(network, Cam)
    return network.eval()


def saved(folder: Path, name: str, height: int, width: int) -> Image:
    random = np.random.default_rng(height)
    rgb = cv2.resize(random.integers(0, 256, (6, 6, 3)).astype(np.uint8), (width, height))
    cv2.imwrite(str(folder / f"{name}.png"), rgb)
    return Image(name, folder / f"{name}.png", height, width, (1,), None, None)


def maps_of(network: Method, images: list[Image]) -> dict[tuple[str, int], NDArray[np.uint8]]:
    return {(name, number): raster for name, number, raster in feature_maps(network, images, CPU)}


def layers_of(network: Cam, image: Image, size: tuple[int, int]) -> list[Tensor]:
    """C x h x w: the taps one by one, and the input of the class-aware convolution."""
    x = normalise(resize(read_rgb(image), size))[None]
    with torch.no_grad():
        taps = [network.backbone.features(x, [name])[name] for name in network.backbone.taps]
        return [found[0] for found in (*taps, network.head.penultimate(taps[-1]))]


def levels(layer: Tensor) -> NDArray[np.float64]:
    """The formula: averaged over the channels, normalised to [0, 1]."""
    mean = layer.double().mean(0).numpy()
    found: NDArray[np.float64] = 255 * (mean - mean.min()) / (mean.max() - mean.min())
    return found


def test_maps_are_the_normalised_means_of_every_layer(tmp_path: Path) -> None:
    images = [saved(tmp_path, "a", 40, 56), saved(tmp_path, "b", 56, 40), saved(tmp_path, "c", 40, 56)]
    network = classifier()
    found = maps_of(network, images)
    assert sorted(found) == [(name, number) for name in "abc" for number in (1, 2, 3, 4)]
    for image in images:
        expected = [levels(layer) for layer in layers_of(network, image, (image.height, image.width))]
        for number, values in enumerate(expected, 1):
            assert found[image.id, number].dtype == np.uint8
            assert found[image.id, number].shape == values.shape
            assert np.abs(found[image.id, number] - values).max() <= 0.51
    assert [found["a", number].shape for number in (1, 2, 3, 4)] == [(10, 14), (10, 14), (5, 7), (5, 7)]


def test_a_head_without_convolutions_is_no_layer(tmp_path: Path) -> None:
    network = classifier(convs=0)
    assert list(network.layers()) == ["conv2", "conv4", "conv6"]
    assert [number for _, number in maps_of(network, [saved(tmp_path, "a", 32, 32)])] == [1, 2, 3]


def test_large_images_are_shrunk_to_321(tmp_path: Path) -> None:
    image = saved(tmp_path, "large", 100, 642)
    network = classifier()
    found = maps_of(network, [image])["large", 1]
    assert found.shape == (13, 81)
    assert np.abs(found - levels(layers_of(network, image, (50, 321))[0])).max() <= 0.51


def test_suppressed_features_are_shown_as_suppressed(tmp_path: Path) -> None:
    image = saved(tmp_path, "a", 40, 56)
    plain, drs = classifier(), classifier(suppression=Suppression(delta=0.3, layers=("head",)))
    expected = layers_of(plain, image, (40, 56))
    found, before = maps_of(drs, [image]), maps_of(plain, [image])
    head = torch.minimum(expected[3], 0.3 * expected[3].amax((1, 2), keepdim=True))
    assert np.abs(found["a", 4] - levels(head)).max() <= 0.51
    assert np.abs(found["a", 4] - before["a", 4].astype(int)).max() > 10
    assert all(np.array_equal(found["a", number], before["a", number]) for number in (1, 2, 3))


def test_the_network_is_left_as_it_was(tmp_path: Path) -> None:
    network = classifier()
    x = torch.randn(1, 3, 32, 32)
    before = network(x).maps
    maps_of(network, [saved(tmp_path, "a", 32, 32)])
    assert torch.equal(network(x).maps, before)
    assert not any(module._forward_hooks for module in network.modules())


def test_a_map_that_is_the_same_everywhere_is_zero(tmp_path: Path) -> None:
    network = classifier()
    for parameter in network.head.convs.parameters():
        nn.init.zeros_(parameter)
    assert not maps_of(network, [saved(tmp_path, "a", 32, 32)])["a", 4].any()


@pytest.mark.parametrize("gallery", [3, 0])
def test_stage_keeps_the_images_of_the_gallery(tmp_path: Path, gallery: int) -> None:
    index = make_index(tmp_path / "tree", train=8, evaluation=2)
    models.save(tmp_path / "model.pt", classifier(), block(), K)
    inputs = {"index": index, "model": tmp_path / "model.pt"}
    outputs = {"features": tmp_path / "features.h5", "layers": tmp_path / "layers.json"}
    job = Job("features", "x", inputs, outputs, {"gallery": gallery})
    features.main(Work(job, inputs, outputs, Runtime(device="cpu", threads=1), "", tmp_path / "checkpoint"))
    store = RasterStore(outputs["features"])
    chosen = choose(Index(index).images("train"), gallery)
    assert store.kind == "features"
    assert list(store) == [image.id for image in chosen]
    assert len(list(store)) == gallery
    assert all(store.classes(name) == [1, 2, 3, 4] for name in store)
    assert json.loads(outputs["layers"].read_text()) == ["conv2", "conv4", "conv6", "head"]
    for image in chosen:
        expected = layers_of(classifier(), image, (image.height, image.width))
        assert np.abs(store.get(image.id, 3) - levels(expected[2])).max() <= 0.51
