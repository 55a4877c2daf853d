"""Pairs of cells and their paths, the affinity loss by plain loops, the affinity network and its stage."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.schema import Affinity, Augmentation, Backbone, Training
from pipeline.data.geometry import Window
from pipeline.data.index import Index
from pipeline.data.loading import Batch
from pipeline.errors import PipelineError
from pipeline.refinement.affinity import AffinityNetwork, affinity_loss
from pipeline.refinement.pairs import at_ends, pairs, strongest
from pipeline.runtime import Runtime
from pipeline.stores.raster import RasterWriter
from pipeline.training import models
from pipeline.training.loop import Task
from pipeline.training.settings import build_optimizer, parameter_groups
from pipeline.workflow.graph import Job
from pipeline.workflow.stage import Work
from stages import affinity
from tests import networks
from tests.marks import DEVICES
from tests.voc_tree import make_index

CPU = torch.device("cpu")
K = 3
Cell = tuple[int, int]


def near_cells(radius: int) -> Iterator[Cell]:
    """Second cells of the pairs that a cell begins: below it, or right of it in its row."""
    for y in range(radius):
        for x in range(-radius, radius + 1):
            if (y > 0 or x > 0) and math.hypot(y, x) < radius:
                yield y, x


def path_cells(y: int, x: int) -> set[Cell]:
    """Of the box between (0, 0) and (y, x) what lies less than one cell from the line through both."""
    inside = set()
    for i in range(y + 1):
        for j in range(min(0, x), max(0, x) + 1):
            along = (i * y + j * x) / math.hypot(y, x)
            if math.hypot(i, j) ** 2 - along**2 < 1 - 1e-9:
                inside.add((i, j))
    return inside


def settings(name: str = "small", channels: int = 8, frozen: bool = True, norms: bool = False) -> Affinity:
    backbone = Backbone(name, frozen_batch_norm=norms)  # type: ignore[arg-type]
    return Affinity("pseudo_labels/x", backbone, Training(2, 0.05, epochs=1), frozen, channels, radius=3)


def network(**changes: Any) -> AffinityNetwork:
    torch.manual_seed(0)
    made = models.build(settings(**changes), K)
    assert isinstance(made, AffinityNetwork)
    return made


# --- pairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("radius", "count"), [(2, 4), (5, 34), (10, 152)])
def test_number_of_pairs(radius: int, count: int) -> None:
    """Radius 2: right, and the three below."""
    ends = [tuple(end) for end in pairs(radius).ends.tolist()]
    assert len(ends) == count
    assert sorted(ends) == sorted(near_cells(radius))


@pytest.mark.parametrize("radius", [2, 5, 10])
def test_paths(radius: int) -> None:
    for path in pairs(radius).paths:
        assert path[0] == (0, 0)
        assert len(set(path)) == len(path)
        assert set(path) == path_cells(*path[-1])


def test_paths_worked_out_by_hand() -> None:
    paths = {path[-1]: set(path) for path in pairs(5).paths}
    assert paths[0, 3] == {(0, 0), (0, 1), (0, 2), (0, 3)}
    assert paths[2, -2] == {(0, 0), (0, -1), (1, 0), (1, -1), (1, -2), (2, -1), (2, -2)}
    assert paths[1, 2] == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)}  # 0.45 and 0.89 away
    assert paths[2, 1] == {(x, y) for y, x in paths[1, 2]}
    assert paths[2, 3] == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3), (2, 2), (2, 3)}  # (0, 2) is 1.11 away


def test_a_radius_without_pairs_is_refused() -> None:
    with pytest.raises(PipelineError, match="radius 1: there are no pairs of cells below this distance; use 2 or more"):
        pairs(1)


def test_the_strongest_cell_of_a_path_gets_the_gradient() -> None:
    maps = torch.tensor([[[0.1, 0.9, 0.2, 0.3]]], requires_grad=True)
    found = strongest(maps, pairs(4))
    ends = pairs(4).ends.tolist()
    three, one = ends.index([0, 3]), ends.index([0, 1])
    assert found[0, three, 0, 0] == torch.tensor(0.9)
    (2 * found[0, three, 0, 0] + found[0, one, 0, 2]).backward()  # type: ignore[no-untyped-call]
    assert maps.grad is not None
    assert maps.grad.tolist() == [[[0, 2, 0, 1]]]


def test_values_at_the_second_cell() -> None:
    found = at_ends(torch.tensor([[[1, 2], [3, 4]]]), pairs(2), 9)
    by_end = {tuple(end): found[0, n].tolist() for n, end in enumerate(pairs(2).ends.tolist())}
    assert by_end == {
        (0, 1): [[2, 9], [4, 9]],
        (1, 0): [[3, 4], [9, 9]],
        (1, 1): [[4, 9], [9, 9]],
        (1, -1): [[9, 3], [9, 9]],
    }


# --- loss -----------------------------------------------------------------------------------------------------------


def expected_loss(logits: NDArray[np.float64], labels: NDArray[np.int64], radius: int, inner: bool = False) -> float:
    """Cell by cell, pair by pair."""
    sets: dict[str, list[float]] = {"background": [], "objects": [], "two": []}
    count, height, width = labels.shape
    for b, row, column in np.ndindex(count, height, width):
        if inner and not (row < height - (radius - 1) and radius - 1 <= column < width - (radius - 1)):
            continue
        for y, x in near_cells(radius):
            if not (row + y < height and 0 <= column + x < width):
                continue
            one, other = labels[b, row, column], labels[b, row + y, column + x]
            if 255 in (one, other):
                continue
            edges = [1 / (1 + math.exp(-logits[b, row + i, column + j])) for i, j in path_cells(y, x)]
            value = 1 - max(edges)
            if one != other:
                sets["two"].append(-math.log(1 - value))
            else:
                sets["objects" if one else "background"].append(-math.log(value))
    background, objects, two = (sum(found) / max(1, len(found)) for found in sets.values())
    return ((background + objects) / 2 + two) / 2


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("radius", [2, 3, 5])
def test_loss_is_that_of_plain_loops(radius: int, inner: bool) -> None:
    random = np.random.default_rng(radius)
    logits = random.normal(0, 2, (2, 8, 11))
    labels = random.choice([0, 1, 2, 255], (2, 8, 11), p=[0.4, 0.3, 0.15, 0.15])
    found = affinity_loss(torch.from_numpy(logits).float()[:, None], torch.from_numpy(labels), radius, inner)
    wanted = expected_loss(logits, labels, radius, inner)
    assert float(found) == pytest.approx(wanted, rel=1e-5)
    assert wanted != pytest.approx(expected_loss(logits, labels, radius, not inner), rel=1e-4)


def test_a_grid_without_inner_cells_has_no_loss() -> None:
    assert affinity_loss(torch.randn(1, 1, 4, 6), torch.zeros(1, 4, 6, dtype=torch.long), 4, inner=True) == 0


@pytest.mark.parametrize("label", [0, 1, 255])
def test_loss_without_some_of_the_pairs(label: int) -> None:
    """Pairs of one kind alone, or none: their logits of 0 cost log 2, a quarter of it counts."""
    logits = torch.zeros(1, 1, 4, 5, requires_grad=True)
    loss = affinity_loss(logits, torch.full((1, 4, 5), label), 3)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(0 if label == 255 else math.log(2) / 4)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.any() == (label != 255)


def test_no_edge_makes_the_loss_infinite() -> None:
    labels = torch.tensor([[[0, 0, 1, 1]]])
    for logit in (-200.0, 200.0):
        logits = torch.full((1, 1, 1, 4), logit, requires_grad=True)
        loss = affinity_loss(logits, labels, 2)
        loss.backward()  # type: ignore[no-untyped-call]
        assert loss.isfinite()
        assert logits.grad is not None
        assert logits.grad.abs().max() > 0.1


def test_loss_of_half_precision_logits_is_of_full_precision() -> None:
    logits = torch.randn(1, 1, 6, 6).bfloat16()
    labels = torch.randint(0, 2, (1, 6, 6))
    assert affinity_loss(logits, labels, 3).dtype == torch.float32
    assert affinity_loss(logits, labels, 3) == affinity_loss(logits.float(), labels, 3)


# --- network --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg16", "resnet50", "resnet101", "resnet38", "mobilenet_v2", "small"])
def test_on_any_backbone(name: str) -> None:
    made = networks.on_meta(lambda: network(name=name))
    edges = made(torch.empty(2, 3, 45, 70, device="meta"))
    assert edges.shape == (2, 1, 12, 18)
    assert edges.dtype == torch.float32
    assert len(made.levels) == len(made.backbone.taps)


@pytest.mark.parametrize("name", ["vgg16", "mobilenet_v2", "small"])
@pytest.mark.parametrize("size", [(32, 48), (21, 9), (1, 5)])
def test_sizes(name: str, size: tuple[int, int]) -> None:
    with torch.no_grad():
        edges = network(name=name).eval()(torch.randn(1, 3, *size))
    assert edges.shape == (1, 1, -(-size[0] // 4), -(-size[1] // 4))
    assert edges.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_backbone_that_learns_does_so_deterministically(device: str, deterministic: None) -> None:
    """Sizes of 321 pixels: the grid does not divide the features of stride 2."""
    gradients = []
    for _ in range(2):
        made = network(frozen=False, name="mobilenet_v2").to(device)
        torch.manual_seed(1)
        images, labels = torch.randn(1, 3, 321, 321), torch.randint(0, 2, (1, 81, 81))
        affinity_loss(made(images.to(device)), labels.to(device), 3).backward()  # type: ignore[no-untyped-call]
        gradients.append([parameter.grad for parameter in made.backbone.parameters() if parameter.grad is not None])
    assert len(gradients[0]) > 20
    assert all(map(torch.equal, *gradients))


def test_channels_that_the_norm_cannot_group_are_refused() -> None:
    with pytest.raises(PipelineError, match="channels 30: group norm has 4 groups; use a multiple"):
        network(channels=30)


def two_halves() -> tuple[Tensor, Tensor]:
    """Two images of two textures that meet in the middle, and their labels on the grid: 0 and 1."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 64, 64, generator=random) * 0.1
    images[..., :32] += 1
    labels = torch.zeros(2, 16, 16, dtype=torch.int64)
    labels[..., 8:] = 1
    return images, labels


@pytest.mark.parametrize(("frozen", "norms"), [(True, False), (False, False), (False, True)])
def test_it_learns_where_classes_meet(frozen: bool, norms: bool) -> None:
    """And a frozen backbone stays as it is, as do batch norms alone where they are frozen."""
    made = network(frozen=frozen, norms=norms).train()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    optimizer = build_optimizer(parameter_groups(made, made.new_layers(), settings().training), settings().training)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    if frozen:
        assert sorted(held) == sorted(id(weight) for layer in made.new_layers() for weight in layer.parameters())
    images, labels = two_halves()
    losses = []
    for _ in range(40):
        loss = affinity_loss(made(images), labels, 3)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    edges = made(images).detach().sigmoid().mean((0, 1, 2))
    assert edges[7:9].max() > 0.7
    assert edges[:5].max() < 0.3
    assert edges[11:].max() < 0.3
    after = made.state_dict()
    for name in before:
        norm = name.split(".")[-2] == "1"  # the second module of a block
        fixed = name.startswith("backbone.") and (frozen or (norms and norm))
        assert torch.equal(before[name], after[name]) == fixed, name


def test_the_task_reduces_labels_to_the_grid() -> None:
    made = network()
    images, labels = two_halves()
    task: Task = affinity.AffinityTask(made, replace(settings(), radius=3))
    whole = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    batch = Batch(images, torch.ones(2, K), ["a", "b"], [Window()] * 2, whole)
    assert float(task.loss(batch, 0).detach()) == float(affinity_loss(made(images), labels, 3).detach())


# --- stage ----------------------------------------------------------------------------------------------------------


def work(folder: Path, block: Affinity) -> Work:
    outputs = {"model": folder / "model.pt", "log": folder / "log.json"}
    inputs = {"index": folder / "index.json", "labels": folder / "labels.h5"}
    job = Job("affinity", "x", inputs, outputs, {"seed": 1}, block)
    return Work(job, inputs, outputs, Runtime(device="cpu", threads=1), "", folder / "checkpoint")


def test_the_stage_trains_and_saves_a_network_that_loads(tmp_path: Path) -> None:
    images = Index(make_index(tmp_path, train=4)).images("train")
    random = np.random.default_rng(0)
    with RasterWriter(tmp_path / "labels.h5", "labels") as writer:
        for image in images:
            writer.append(
                image.id, random.choice([0, image.tags[0], 255], (image.height, image.width)).astype(np.uint8)
            )
    block = Affinity(
        "pseudo_labels/x",
        Backbone("small"),
        Training(2, 0.1, epochs=2),
        channels=8,
        radius=3,
        augmentation=Augmentation(scale=(0.5, 1.5), crop=32),
    )
    affinity.main(work(tmp_path, block))
    assert (tmp_path / "log.json").exists()
    loaded = models.load(tmp_path / "model.pt", K, CPU)
    assert isinstance(loaded, AffinityNetwork)
    assert not loaded.training
    torch.manual_seed(1)
    fresh = models.build(block, K)
    assert isinstance(fresh, AffinityNetwork)
    assert not torch.equal(loaded.edge.weight, fresh.edge.weight)


def test_the_stage_names_images_without_labels(tmp_path: Path) -> None:
    make_index(tmp_path, train=3)
    with RasterWriter(tmp_path / "labels.h5", "labels") as writer:
        writer.add_image("img_000")
    with pytest.raises(PipelineError, match=r"labels\.h5: has no label map for 2 training images, first img_001"):
        affinity.main(work(tmp_path, settings()))
