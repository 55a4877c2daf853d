"""A training in several processes gives what one gives, but for rounding (``pipeline.training.distributed``).

The dataset has 17 images, or 18: two batches of 8 are followed by one of 1 or 2, of which some rank has no part.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipeline import cards
from pipeline.config.params import check, load, validate
from pipeline.errors import PipelineError
from pipeline.ranks import Place
from pipeline.runtime import Runtime
from pipeline.stores.raster import RasterStore
from pipeline.workflow.freshness import is_fresh
from pipeline.workflow.graph import Graph
from pipeline.workflow.stage import execute
from stages import classifier as classifier_stage
from tests import rank_stages
from tests.project import run_stages
from tests.voc_tree import make_tree, minimal_params

SMALL = {"name": "small"}
TRAINING = {"batch_size": 8, "lr": 0.01, "epochs": 3, "precision": "fp32"}
JITTER = {"jitter": [0.2, 0.2, 0.2, 0.1]}
HEAD = {"convs": 1, "channels": 8, "batch_norm": True}
CONFIDENT = {"confident": {"high": 0.4, "low": 0.2, "crf": {"iterations": 1}}}
LARGEFOV = {"deeplab_largefov": {"channels": 16, "rate": 2, "dropout": 0.5}}
EDAM = {"channels": 8, "heads": 2, "hidden": 16, "dropout": 0.1}
AGEN = {"shared": ["conv2", "conv2"], "head": {"convs": 1, "channels": 8}, "channels": 16, "rate": 2, "agm": [4, 5]}
AGEN |= {"agm_channels": [8, 12], "coam": [4, 5], "grid": 7, "delay": 1}


def classifier(**more: Any) -> dict[str, Any]:
    training = TRAINING | more.pop("training", {})
    accumulate = {"cells": 6, "skip_epochs": 1, "snapshots": True, **more.pop("accumulate", {})}
    augmentation = {"crop": 24, **JITTER}
    block = {"backbone": SMALL, "training": training, "head": HEAD, "accumulate": accumulate}
    return {**block, "augmentation": augmentation, **more}


def trained(**more: Any) -> dict[str, Any]:
    return {"backbone": SMALL, "training": TRAINING, **more}


def agen(**settings: Any) -> dict[str, Any]:
    backbones = {"classification": SMALL, "segmentation": SMALL}
    network = {"agen": AGEN | settings}
    return {"backbones": backbones, "training": TRAINING, "network": network, "augmentation": {"crop": 24}}


BLOCKS: dict[str, dict[str, dict[str, Any]]] = {
    "classifiers": {
        "base": classifier(training={"batch_size": 4}),
        "plain": classifier(backbone=SMALL | {"frozen_batch_norm": True}, head=HEAD | {"batch_norm": False}),
        "drop": classifier(attention_drop={"beta": 0.7, "delta": 0.3}),
        "average": classifier(
            accumulate={"fusion": "average", "gate": "none"}, training={"accumulation": 2}, suppression={"delta": 0.5}
        ),
        "edam": classifier(method={"edam": EDAM}),
        "edam_random": classifier(method={"edam": EDAM | {"pairing": "random", "group": 4, "dropout": 0.0}}),
        "amr": classifier(method="amr"),
        "localization": classifier(method="oaa_localization", accumulate={"skip_epochs": 0, "gate": "strict"}),
        "seam": classifier(method={"seam": {"scale": 0.6}}),
    },
    "refinements": {
        "integral": trained(source="classifiers/base", network="integral"),
        "pooled": trained(source="classifiers/base", network={"regression": {"reduction": "pooled"}}),
    },
    "pseudo_labels": {"confident": {"source": "classifiers/base", "normalise": "max", "rule": CONFIDENT}},
    "affinities": {"base": trained(labels="pseudo_labels/confident", frozen_backbone=False, radius=3)},
    "segmentations": {
        "masks": trained(labels="ground_truth", network=LARGEFOV, augmentation={"crop": 24}),
        "pooled": {
            **trained(labels="ground_truth", network={"deeplab_v3plus": {"channels": 8, "rates": [1, 2, 3]}}),
            "training": TRAINING | {"batch_size": 2, "epochs": 1},
        },
        "own": trained(labels="ground_truth", network=LARGEFOV, loss_size="output", self_training=True),
    },
    "one_step": {
        "agen": agen(boundary_weight=0.0),
        "agen_boundary": agen(),
    },
}


def project(folder: Path, images: int) -> Path:
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        params = minimal_params(make_tree(Path("data"), train=images, evaluation=2, size=(28, 36)))
        for section, blocks in BLOCKS.items():
            params[section] = params.get(section, {}) | blocks
        Path("params.yaml").write_text(yaml.safe_dump(params))
        run_stages(["params.yaml"], "index")
        run_stages(["params.yaml"], "ground_truth")
        run_stages(["params.yaml"], "pseudo_labels confident")
    return folder


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project(tmp_path_factory.mktemp("distributed") / "odd", 17)


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project(tmp_path_factory.mktemp("distributed") / "even", 18)


def train(
    stage: str, name: str, processes: int, main: Callable[[Any], None] | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Train in the working folder, in float64 by default: weights, log, and the maps of the classifiers."""
    job = Graph(load([Path("params.yaml")])).find(stage, name)
    main = main or partial(rank_stages.in_float64, stage)
    execute(job, main, Runtime(device=device, threads=1, processes=processes), force=True)
    stores = {key: RasterStore(job.outputs[key]) for key in ("maps", "snapshots") if key in job.outputs}
    maps = {
        f"{key} {image} {tag}": raster
        for key, store in stores.items()
        for image in store
        for tag, raster in store.maps(image).items()
    }
    log = json.loads(job.outputs["log"].read_text())
    return {"weights": torch.load(job.outputs["model"])["state"], "maps": maps, "log": log}


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, values in one["weights"].items():
        difference = float((values.double() - other["weights"][name].double()).abs().max())
        assert difference < 1e-10, (name, difference)
    assert one["maps"].keys() == other["maps"].keys()
    for name, raster in one["maps"].items():
        assert np.array_equal(raster, other["maps"][name]), name
    for key in ("steps", "epochs"):
        assert len(one["log"][key]) == len(other["log"][key]) > 0
        for mine, theirs in zip(one["log"][key], other["log"][key], strict=True):
            assert mine == pytest.approx(theirs, abs=2e-6), key


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("classifier", "drop"),
        ("classifier", "average"),
        ("classifier", "amr"),
        ("classifier", "localization"),
        ("classifier", "seam"),
        ("classifier", "edam_random"),
        ("refinement", "integral"),
        ("refinement", "pooled"),
        ("affinity", "base"),
        ("segmentation", "masks"),
        ("segmentation", "own"),
        ("segmentation", "pooled"),
        ("one_step", "agen"),
        ("one_step", "agen_boundary"),
    ],
)
def test_two_processes_train_as_one(odd: Path, monkeypatch: pytest.MonkeyPatch, stage: str, name: str) -> None:
    monkeypatch.chdir(odd)
    one, other = train(stage, name, 1), train(stage, name, 2)
    assert_equal(one, other)
    assert other["log"]["arithmetic"][0].endswith(", 2 processes")


def test_edam_keeps_its_groups_and_its_dropout(even: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(even)
    assert_equal(train("classifier", "edam", 1), train("classifier", "edam", 2))


@pytest.mark.parametrize(("stage", "name"), [("classifier", "drop"), ("segmentation", "masks")])
def test_three_processes_with_different_numbers_of_images(
    odd: Path, monkeypatch: pytest.MonkeyPatch, stage: str, name: str
) -> None:
    """A batch of 8 is shared as 3, 3 and 2; two of three have no part of the last one."""
    monkeypatch.chdir(odd)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(3))
    assert_equal(train(stage, name, 1), train(stage, name, 3))


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(("stage", "name"), [("classifier", "drop"), ("segmentation", "masks"), ("one_step", "agen")])
def test_two_cards_train_as_one(odd: Path, monkeypatch: pytest.MonkeyPatch, stage: str, name: str) -> None:
    monkeypatch.chdir(odd)
    torch.cuda.init()  # before the first training hides the other card from the second one
    one = train(stage, name, 1, device="cuda")
    cards.release()  # a card may have a single slot
    assert_equal(one, train(stage, name, 2, device="cuda"))


def test_float32_agrees_within_its_rounding(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage as it is. Its network has no batch norm in training mode, which amplifies rounding."""
    monkeypatch.chdir(odd)
    one, two = (train("classifier", "plain", processes, main=classifier_stage.main) for processes in (1, 2))
    for name, values in one["weights"].items():
        assert torch.allclose(values, two["weights"][name], rtol=0, atol=1e-6), name
    assert one["maps"].keys() == two["maps"].keys()
    for name, raster in one["maps"].items():
        assert np.abs(raster.astype(int) - two["maps"][name]).max() <= 1, name


class TestParts:
    """Which images of a batch a rank computes."""

    @pytest.mark.parametrize("count", [1, 2, 3, 4])
    @pytest.mark.parametrize("unit", [1, 2, 4])
    @pytest.mark.parametrize("size", range(1, 17))
    def test_parts_are_disjoint_and_complete_and_split_no_unit(self, size: int, unit: int, count: int) -> None:
        places = [Place(rank, count) for rank in range(count)]
        parts = [list(range(size))[place.part(size, unit)] for place in places]
        assert [number for part in parts for number in part] == list(range(size))
        assert all(part[0] % unit == 0 for part in parts if part)
        assert len(parts[0]) == max(map(len, parts))
        loaded = [list(range(size))[place.loaded(size, unit)] for place in places]
        assert all(images == (part or parts[0][:unit]) for images, part in zip(loaded, parts, strict=True))


class TestFaults:
    """Params that do not fit are refused before any work, with the key."""

    def faults(self, **blocks: Any) -> tuple[str, ...]:
        params = {**yaml.safe_load(Path("params.yaml").read_text()), "method": "cam"}
        params["classifiers"] = {"base": classifier(**blocks)}
        with pytest.raises(PipelineError) as caught:
            check(validate(params).classifiers["base"])
        return caught.value.lines

    @pytest.mark.parametrize(
        ("blocks", "line"),
        [
            (
                {"training": {"processes": 3}},
                "training.processes: batch_size 8 is not a multiple of 3; change either",
            ),
            (
                {"training": {"processes": 4}, "method": {"edam": EDAM | {"group": 4}}},
                "training.processes: 2 images for each of 4 processes would split a group of method.edam.group, 4; "
                "batch_size must be a multiple of 16",
            ),
            (
                {"training": {"processes": 2}, "method": {"amr": {"statistics": "batch"}}},
                "method.amr.statistics: batch needs training.processes 1, or set it to sample",
            ),
        ],
    )
    def test_params(self, odd: Path, monkeypatch: pytest.MonkeyPatch, blocks: Any, line: str) -> None:
        monkeypatch.chdir(odd)
        (found,) = self.faults(**blocks)
        assert found.endswith(f"classifiers.base.{line}")

    def test_more_processes_than_cores(self, odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(odd)
        monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})
        with pytest.raises(PipelineError) as caught:
            train("classifier", "drop", 2)
        assert caught.value.lines == ("training.processes: 2 processes need as many cores, not 1; lower it",)


def test_the_number_of_processes_makes_nothing_outdated(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no part of a job's params, as threads are not; nor of the model file."""
    monkeypatch.chdir(odd)
    files = [Path("params.yaml")]
    one, two = (
        Graph(load(files, {"classifiers": {"base": {"training": {"processes": processes}}}})) for processes in (1, 2)
    )
    mine, theirs = one.find("classifier", "base"), two.find("classifier", "base")
    assert (mine.processes, theirs.processes) == (1, 2)
    assert mine.params == theirs.params
    assert "processes" not in mine.params["block"]["training"]
    assert is_fresh(mine, {})
    assert is_fresh(theirs, {})
    assert two.find("features", "base").processes == 2
    assert two.find("pseudo_labels", "confident").processes == 1
