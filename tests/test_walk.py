"""The random walk against the dense one in float64, its limits, and its stage."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config.params import read, validate
from pipeline.config.schema import Affinity, Backbone, Training, Walk
from pipeline.data.index import Image, Index
from pipeline.data.loading import normalise
from pipeline.errors import PipelineError
from pipeline.inference.walk import edge_maps, walked_maps
from pipeline.refinement.walk import random_walk, transition_matrix
from pipeline.runtime import Runtime
from pipeline.stores.raster import Raster, RasterStore, RasterWriter
from pipeline.training import models
from pipeline.workflow.graph import Job
from pipeline.workflow.stage import Work
from stages import walk
from tests.networks import resize
from tests.project import ROOT
from tests.test_affinity import near_cells, path_cells
from tests.voc_tree import make_index

CPU = torch.device("cpu")
WALK = Walk("affinities/x", "localizations/x")
PLAIN = replace(WALK, edge_weighting=False)
Array = NDArray[np.float64]


def dense_transitions(edges: Array, radius: int, beta: float) -> Array:
    """N x N, pair by pair."""
    height, width = edges.shape
    affinities = np.eye(edges.size)
    for row, column in np.ndindex(height, width):
        for y, x in near_cells(radius):
            if row + y < height and 0 <= column + x < width:
                one, other = row * width + column, (row + y) * width + column + x
                value = 1 - max(edges[row + i, column + j] for i, j in path_cells(y, x))
                affinities[one, other] = affinities[other, one] = value**beta
    return affinities / affinities.sum(1, keepdims=True)


def dense_walk(maps: Array, edges: Array, settings: Walk) -> Array:
    """C x h x w; the matrix is squared, as in the public codes."""
    transitions = dense_transitions(edges, settings.radius, settings.beta)
    for _ in range(settings.times):
        transitions = transitions @ transitions
    seeds = maps**settings.power * (1 - edges if settings.edge_weighting else 1)
    found: Array = (transitions @ seeds.reshape(len(maps), -1).T).T.reshape(maps.shape)
    return found


@pytest.mark.parametrize("shape", [(9, 13), (13, 4), (3, 3), (1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize(
    "settings", [WALK, replace(WALK, radius=2, beta=3, times=3), replace(PLAIN, power=1.5, radius=7, times=6)]
)
def test_it_is_the_dense_walk(shape: tuple[int, int], settings: Walk) -> None:
    """Two images at once, each with edges of its own."""
    random = np.random.default_rng(0)
    edges, maps = random.random((2, *shape)) ** 3, random.random((2, 3, *shape))
    found = random_walk(torch.from_numpy(maps).float(), torch.from_numpy(edges).float(), settings)
    for b in range(2):
        expected = dense_walk(maps[b], edges[b], settings)
        np.testing.assert_allclose(found[b].numpy(), expected, rtol=0, atol=1e-6)


def test_transitions_are_the_dense_ones() -> None:
    random = np.random.default_rng(1)
    edges = random.random((2, 5, 7))
    edges[0, 2] = 1
    found = transition_matrix(torch.from_numpy(edges).float(), 4, 2.0).to_dense().numpy()
    for b in range(2):
        own = slice(35 * b, 35 * (b + 1))
        np.testing.assert_allclose(found[own, own], dense_transitions(edges[b], 4, 2.0), atol=1e-6)
    assert not found[:35, 35:].any()
    assert not found[35:, :35].any()


def test_it_holds_no_more_than_near_pairs() -> None:
    """Radius 5 has 34 pairs: 69 numbers a row, and fewer at the border."""
    matrix = transition_matrix(torch.zeros(1, 40, 50), 5, 10.0)
    assert matrix.layout == torch.sparse_csr
    counts = matrix.crow_indices().diff().view(40, 50)
    assert counts.max() == 69
    assert (counts == 69).sum() == 32 * 42
    assert counts[0, 0] == 1 + 8 + sum(1 for y, x in near_cells(5) if y > 0 and x > 0)


def test_a_step_worked_out_by_hand() -> None:
    """Two cells of edges 0.5 and 0: their affinity is 0.5, squared 0.25; a walk of one step."""
    settings = replace(WALK, beta=2, times=0, power=2)
    found = random_walk(torch.tensor([[[[1.0, 0.5]]]]), torch.tensor([[[0.5, 0.0]]]), settings)
    assert found[0, 0, 0].tolist() == pytest.approx([(0.5 + 0.25 * 0.25) / 1.25, (0.25 * 0.5 + 0.25) / 1.25])


def closed_room() -> Tensor:
    """An edge one cell wide around cells (3..8, 3..8), cornered diagonally on the right."""
    edges = torch.zeros(1, 14, 14)
    for column in range(3, 9):
        edges[0, 2, column] = edges[0, 9, column] = edges[0, column, 2] = 1
    for row, column in zip(range(2, 10), (9, 10, 11, 12, 12, 11, 10, 9), strict=True):
        edges[0, row, column] = 1
    edges[0, 2, 2] = edges[0, 9, 2] = 1
    return edges


def test_a_seed_fills_its_region_and_not_more() -> None:
    edges = closed_room()
    seed = torch.zeros(1, 1, 14, 14)
    seed[0, 0, 4, 4] = 1
    found = random_walk(seed, edges, WALK)[0, 0].numpy()
    wall = (edges[0] == 1).numpy().astype(np.uint8)
    _, regions = cv2.connectedComponents(1 - wall, connectivity=4)
    inside = regions == regions[4, 4]
    assert inside.sum() == 6 * 6 + 12  # what bulges on the right
    assert found[inside].min() > 0.5 * found[inside].max() > 0
    assert not found[~inside].any()


def test_what_is_the_same_everywhere_stays() -> None:
    edges = torch.rand(1, 8, 9)
    assert torch.allclose(random_walk(torch.full((1, 1, 8, 9), 0.7), edges, PLAIN), torch.tensor(0.7))


def test_nothing_stays_nothing() -> None:
    for edges in (torch.zeros(1, 6, 6), torch.ones(1, 6, 6)):
        assert not random_walk(torch.zeros(1, 2, 6, 6), edges, WALK).any()


def test_edges_everywhere_leave_the_maps_where_they_are() -> None:
    maps = torch.rand(1, 2, 6, 6)
    assert torch.equal(random_walk(maps, torch.ones(1, 6, 6), PLAIN), maps)


def test_images_do_not_touch_each_other() -> None:
    maps, edges = torch.rand(3, 2, 7, 8), torch.rand(3, 7, 8)
    together = random_walk(maps, edges, WALK)
    for b in range(3):
        alone = random_walk(maps[b : b + 1], edges[b : b + 1], WALK)[0]
        assert torch.allclose(alone, together[b], rtol=0, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda() -> None:
    maps, edges = torch.rand(2, 2, 20, 30), torch.rand(2, 20, 30) ** 3
    found = random_walk(maps.cuda(), edges.cuda(), WALK)
    assert torch.allclose(found.cpu(), random_walk(maps, edges, WALK), atol=1e-6)


# --- whole images ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 would hide small errors."""
    monkeypatch.setattr("pipeline.inference.folding.uses_bf16", lambda device, precision: False)
    monkeypatch.setattr(
        "pipeline.inference.walk.autocast",
        lambda device, precision: torch.autocast(device.type, torch.bfloat16, enabled=False),
    )


class Red(nn.Module):
    """Its edges are where the image is red, a quarter of its size; no mirror image has the same ones."""

    stride = 4

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :1, ::4, ::4] * 4 - 2


def saved(folder: Path, name: str, rgb: NDArray[np.uint8], tags: tuple[int, ...]) -> Image:
    cv2.imwrite(str(folder / f"{name}.png"), rgb[..., ::-1])
    return Image(name, folder / f"{name}.png", rgb.shape[0], rgb.shape[1], tags, None, None)


def stored(folder: Path, rasters: dict[str, dict[int, Raster]]) -> RasterStore:
    with RasterWriter(folder / "maps.h5", "localization") as writer:
        for name, found in rasters.items():
            writer.add_image(name)
            for tag, raster in found.items():
                writer.append(name, raster, tag)
    return RasterStore(folder / "maps.h5")


def walked(store: RasterStore, images: Sequence[Image], settings: Walk = WALK) -> dict[tuple[str, int], Raster]:
    return {(name, tag): values for name, tag, values in walked_maps(Red(), images, store, settings, CPU)}


def noise(seed: int, *shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def test_maps_are_walked_at_the_grid_of_edges_and_divided_by_the_strongest_class(tmp_path: Path) -> None:
    rgb = noise(0, 24, 33, 3)
    image = saved(tmp_path, "a", rgb, (2, 5))
    maps = {2: noise(1, 6, 9) // 4, 5: noise(2, 6, 9), 7: noise(3, 6, 9)}  # 7 is no tag of the image
    found = walked(stored(tmp_path, {"a": maps}), [image])
    assert list(found) == [("a", 2), ("a", 5)]

    pixels = normalise(rgb)[0].double().numpy()
    straight, mirrored = pixels[::4, ::4], pixels[:, ::-1][::4, ::4][:, ::-1]
    edges = 1 / (1 + np.exp(-(2 * straight + 2 * mirrored - 2)))
    expected = dense_walk(np.stack([maps[2], maps[5]]) / 255, edges, WALK)
    expected *= 255 / expected.max()
    assert expected[1].max() == 255 > 1.5 * expected[0].max()
    for tag, values in zip((2, 5), expected, strict=True):
        assert found["a", tag].dtype == np.uint8
        np.testing.assert_allclose(found["a", tag], values, atol=0.51)


@pytest.mark.parametrize("shape", [(24, 33), (21, 30), (5, 3)])
def test_grid_pixels_upsamples_and_crops_before_the_division(tmp_path: Path, shape: tuple[int, int]) -> None:
    """IRN's code: by 4, whatever the image's size, in float64 NumPy."""
    rgb = noise(0, *shape, 3)
    cells = -(-shape[0] // 4), -(-shape[1] // 4)
    image = saved(tmp_path, "a", rgb, (2, 5))
    maps = {2: noise(1, *cells) // 4, 5: noise(2, *cells)}
    found = walked(stored(tmp_path, {"a": maps}), [image], replace(WALK, grid="pixels"))
    pixels = normalise(rgb)[0].double().numpy()
    straight, mirrored = pixels[::4, ::4], pixels[:, ::-1][::4, ::4][:, ::-1]
    edges = 1 / (1 + np.exp(-(2 * straight + 2 * mirrored - 2)))
    spread = dense_walk(np.stack([maps[2], maps[5]]) / 255, edges, WALK)
    expected = resize(spread, 4 * cells[0], 4 * cells[1])[:, : shape[0], : shape[1]]
    for tag, values in zip((2, 5), expected * (255 / expected.max()), strict=True):
        assert found["a", tag].shape == shape
        np.testing.assert_allclose(found["a", tag], values, atol=0.51)
    assert expected.max() <= spread.max()


def test_edges_of_an_image_and_its_mirror_image_mirror_each_other() -> None:
    images = torch.randn(2, 3, 16, 20)
    found = edge_maps(Red(), images)
    assert torch.allclose(edge_maps(Red(), images.flip(3)), found.flip(2), atol=1e-6)
    assert (found - Red()(images)[:, 0].sigmoid()).abs().max() > 0.1


def test_maps_of_any_size_are_resized_to_the_grid(tmp_path: Path) -> None:
    """A map that is the same everywhere stays so, whatever its size."""
    image = saved(tmp_path, "a", noise(0, 40, 30, 3), (1, 2))
    maps = {1: np.full((3, 2), 200, np.uint8), 2: np.full((40, 30), 100, np.uint8)}
    found = walked(stored(tmp_path, {"a": maps}), [image], PLAIN)
    assert (found["a", 1] == 255).all()
    assert np.isin(found["a", 2], (127, 128)).all()  # 100 / 200 of 255
    assert found["a", 2].shape == (10, 8)


def test_images_with_empty_maps_missing_maps_and_no_maps(tmp_path: Path) -> None:
    images = [saved(tmp_path, name, noise(0, 8, 8, 3), (1, 2)) for name in "abc"]
    maps: dict[str, dict[int, Raster]] = {
        "a": {1: np.zeros((2, 2), np.uint8), 2: np.zeros((2, 2), np.uint8)},
        "b": {2: np.full((2, 2), 9, np.uint8)},
        "c": {},
    }
    found = walked(stored(tmp_path, maps), images)
    assert sorted(found) == [("a", 1), ("a", 2), ("b", 2)]
    assert not found["a", 1].any()
    assert found["b", 2].max() == 255
    assert walked(stored(tmp_path, maps), images[2:]) == {}


@pytest.mark.parametrize("size", [(1, 30), (30, 1), (1, 1), (5, 3)])
def test_narrow_images(tmp_path: Path, size: tuple[int, int]) -> None:
    image = saved(tmp_path, "a", noise(0, *size, 3), (1,))
    found = walked(stored(tmp_path, {"a": {1: np.full((2, 2), 50, np.uint8)}}), [image])
    assert found["a", 1].shape == (-(-size[0] // 4), -(-size[1] // 4))
    assert found["a", 1].max() == 255


def test_an_image_alone_is_as_in_a_batch(tmp_path: Path) -> None:
    images = [saved(tmp_path, f"i{n}", noise(n, 24, 28, 3), tags) for n, tags in enumerate([(1,), (1, 2, 3), (2, 3)])]
    images.append(saved(tmp_path, "other", noise(9, 20, 28, 3), (1,)))
    store = stored(tmp_path, {image.id: {tag: noise(tag, 6, 7) for tag in image.tags} for image in images})
    together = walked(store, images)
    assert len(together) == 7
    for image in images:
        for key, values in walked(store, [image]).items():
            np.testing.assert_allclose(values.astype(int), together[key], rtol=0, atol=1)


# --- stage ----------------------------------------------------------------------------------------------------------


EDGES = Affinity("pseudo_labels/x", Backbone("small"), Training(2, 0.1, epochs=1), channels=8)


def work(folder: Path, settings: Walk = WALK) -> Work:
    inputs = {key: folder / name for key, name in (("index", "index.json"), ("model", "model.pt"), ("maps", "maps.h5"))}
    outputs = {"maps": folder / "walked.h5"}
    job = Job("walk", "x", inputs, outputs, {}, settings, used_blocks=(EDGES,))
    return Work(job, inputs, outputs, Runtime(device="cpu", threads=1), "", folder / "parts")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """An index, an affinity network and maps of three training images and of one of the evaluation split."""
    index = Index(make_index(tmp_path, train=3, evaluation=1))
    torch.manual_seed(0)
    models.save(tmp_path / "model.pt", models.build(EDGES, 3), EDGES, 3)
    rasters = {image.id: {tag: noise(tag, 6, 8) for tag in image.tags} for image in index.images()}
    stored(tmp_path, rasters)
    return tmp_path


def test_the_stage_walks_the_training_images(project: Path) -> None:
    walk.main(work(project))
    store = RasterStore(project / "walked.h5")
    index = Index(project / "index.json")
    assert store.kind == "localization"
    assert list(store) == [image.id for image in index.images("train")]
    for image in index.images("train"):
        maps = store.maps(image.id)
        assert tuple(maps) == image.tags
        assert max(values.max() for values in maps.values()) == 255
        assert all(values.shape == (6, 8) for values in maps.values())


def test_the_stage_goes_on_where_it_was(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk.main(work(project))
    whole = (project / "walked.h5").read_bytes()

    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("the parts hold all of it")

    monkeypatch.setattr(walk, "walked_maps", never)
    walk.main(work(project))
    assert (project / "walked.h5").read_bytes() == whole


def test_the_stage_names_images_without_maps(project: Path) -> None:
    stored(project, {"img_001": {}})
    with pytest.raises(
        PipelineError, match=r"maps\.h5: lacks 2 training images: img_000, img_002; run its stage again"
    ):
        walk.main(work(project))


def test_settings_that_cannot_be_are_named_all_at_once() -> None:
    data = read([ROOT / "params.yaml"])
    training = {"batch_size": 2, "lr": 0.1, "epochs": 1}
    network = {"labels": "pseudo_labels/cam", "backbone": {"name": "small"}, "training": training}
    data["affinities"] |= {"bad": {**network, "radius": 1}, "odd": {**network, "channels": 6}}
    maps = {"affinity": "affinities/bad", "maps": "localizations/cam"}
    data["walks"]["bad"] = {**maps, "radius": 1, "times": -1, "beta": 0.0, "power": -1.0}
    with pytest.raises(PipelineError) as caught:
        validate(data)
    assert [line.split(": ")[1] for line in caught.value.lines] == [
        "affinities.bad.radius",
        "affinities.odd.channels",
        "walks.bad.radius",
        "walks.bad.beta",
        "walks.bad.times",
        "walks.bad.power",
    ]


def test_the_stage_refuses_a_network_of_another_dataset(project: Path) -> None:
    block = Affinity("pseudo_labels/x", Backbone("small"), Training(2, 0.1, epochs=1), channels=8)
    models.save(project / "model.pt", models.build(block, 5), block, 5)
    with pytest.raises(PipelineError, match=r"model\.pt: was trained on 5 classes, the dataset has 3"):
        walk.main(work(project))
