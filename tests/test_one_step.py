"""The one-step network as a stage: alone, in the graph beside other networks, in the report, and its two-step form."""

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.config import params as parameters
from pipeline.config import references
from pipeline.config.registry import ONE_STEP, Choice
from pipeline.config.schema import Backbone, OneStep, Training
from pipeline.data.loader import LoadingPlan, loading_plan
from pipeline.errors import PipelineError
from pipeline.methods.agen import Agen
from pipeline.report import metrics, protocol
from pipeline.runtime import Runtime
from pipeline.stores.files import sha256
from pipeline.stores.raster import RasterStore
from pipeline.workflow import dvc
from pipeline.workflow.graph import Graph
from pipeline.workflow.stage import run
from stages import evaluation, ground_truth, index, localization, one_step, prediction, pseudo_labels
from tests.drawn import RAW, experiment, training_logs
from tests.project import link_code
from tests.voc_tree import make_tree, minimal_params

AGEN: dict[str, Any] = {
    "shared": ["conv2", "conv2"],
    "head": {"convs": 1, "channels": 8},
    "channels": 8,
    "rate": 2,
    "agm_channels": [8, 8],
    "grid": 6,
}
LEARNER: dict[str, Any] = {
    "network": {"agen": AGEN},
    "backbones": {"classification": {"name": "small"}, "segmentation": {"name": "small"}},
    "training": {"batch_size": 2, "lr": 0.02, "epochs": 2, "lr_new": 1.0},
}


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Params of a small tree in the working directory, with a one-step network and its two-step form."""
    monkeypatch.chdir(tmp_path)
    link_code(tmp_path)
    params = minimal_params(make_tree(Path("data")))
    params["one_step"] = {"agen": copy.deepcopy(LEARNER)}
    params["localizations"]["agen"] = {"model": "one_step/agen", "normalise": "none"}
    params["pseudo_labels"]["agen"] = {
        "source": "localizations/agen",
        "rule": {"threshold": {"background": {"power": 1.0}}},
        "normalise": "none",
    }
    params["segmentations"]["agen_two_step"] = {**params["segmentations"]["cam"], "labels": "pseudo_labels/agen"}
    return params


def write(raw: dict[str, Any]) -> Graph:
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    return Graph(parameters.load([Path("params.yaml")]))


def test_from_tags_to_scores_and_to_labels(raw: dict[str, Any]) -> None:
    write(raw)
    arguments = ["agen", "--device", "cpu", "--threads", "1"]
    run("index", index.main, [])
    run("ground_truth", ground_truth.main, [])
    run("one_step", one_step.main, arguments)
    run("prediction", prediction.main, arguments)
    run("evaluation", evaluation.main, ["predictions/agen"])
    run("localization", localization.main, arguments)
    results = Path("results/test")
    log = json.loads((results / "one_step/agen/log.json").read_text())
    assert [entry["epoch"] for entry in log["epochs"]] == [0, 1]
    for entry in log["epochs"]:
        terms = [entry[name] for name in ("classification", "segmentation", "boundary")]
        assert sum(terms) == pytest.approx(entry["loss"], abs=1e-4)
        assert all(term > 0 for term in terms)
    assert all(log["epochs"][1][f"lambda_{stage}"] != 0 for stage in (3, 4, 5))
    assert 0 <= json.loads((results / "evaluation/predictions/agen/scores.json").read_text())["miou"] <= 1
    maps, predicted = (
        RasterStore(results / "localizations/agen/maps.h5"),
        RasterStore(results / "predictions/agen/labels.h5"),
    )
    assert {len(maps.maps(image)) for image in maps} == {1, 2}
    assert set(predicted) == {"img_004", "img_005"}
    assert predicted.get("img_004").max() <= 3
    run("saliency", pytest.importorskip("stages.saliency").main, [])
    run("pseudo_labels", pseudo_labels.main, ["agen"])
    assert set(RasterStore(results / "pseudo_labels/agen/labels.h5")) == set(maps)


def test_the_model_does_not_depend_on_who_computes_the_crf(raw: dict[str, Any]) -> None:
    write(raw)
    run("index", index.main, [])
    hashes = []
    for workers in ("0", "1", "2"):
        run("one_step", one_step.main, ["agen", "--device", "cpu", "--threads", "1", "--workers", workers, "--force"])
        hashes.append(sha256(Path("results/test/one_step/agen/model.pt")))
    assert len(set(hashes)) == 1


@pytest.mark.parametrize(
    ("workers", "weight", "expected"),
    [(0, 1.0, (0, 0)), (1, 1.0, (0, 1)), (2, 1.0, (1, 1)), (6, 1.0, (1, 5)), (14, 1.0, (3, 11)), (6, 0.0, (6, 0))],
)
def test_loading_and_crf_divide_the_workers(
    raw: dict[str, Any], workers: int, weight: float, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They work at the same time. The memory for images stays that of all the job's cores."""
    raw["one_step"]["agen"]["network"]["agen"]["boundary_weight"] = weight
    write(raw)
    run("index", index.main, [])
    started: dict[str, int] = {}

    def plan(dataset: Any, size: int, count: int, *others: Any) -> LoadingPlan:
        started["loading"] = count
        return loading_plan(dataset, size, 0, *others)

    def parallel(label: str, count: int, chunk: int) -> Any:
        started["CRF"] = count
        return nullcontext(map)

    def budget(runtime: Runtime) -> int:
        started["all"] = runtime.threads + runtime.workers + runtime.helpers
        return 0

    monkeypatch.setattr("pipeline.training.loop.loading_plan", plan)
    monkeypatch.setattr("pipeline.training.loop.cache_budget", budget)
    monkeypatch.setattr(one_step, "parallel", parallel)
    run("one_step", one_step.main, ["agen", "--device", "cpu", "--threads", "1", "--workers", str(workers)])
    assert (started["loading"], started["CRF"]) == expected
    assert started["all"] == 1 + workers


def test_an_epochs_terms_are_part_of_the_checkpoint() -> None:
    torch.manual_seed(0)
    own = {"shared": ["conv2", "conv2"], "head": {"convs": 0}, "channels": 8, "agm": [], "coam": []}
    backbones = {name: Backbone("small") for name in ("classification", "segmentation")}
    choice = Choice(ONE_STEP, "agen", own | {"boundary_weight": 0})
    network = Agen(OneStep(choice, backbones, Training(1, 0.1, epochs=1)), 2)
    unbroken, first, second = (one_step.OneStepTask(network, map) for _ in range(3))

    class Part:
        def __init__(self) -> None:
            self.images, self.tags = torch.randn(1, 3, 16, 16), torch.tensor([[1.0, 0]])

    parts: list[Any] = [Part(), Part(), Part()]
    for part in parts:
        unbroken.loss(part, 0)
    first.loss(parts[0], 0)
    second.restore(first.state())
    for part in parts[1:]:
        second.loss(part, 0)
    wanted = unbroken.end_epoch(0)
    assert second.end_epoch(0) == pytest.approx(wanted, rel=1e-5)
    assert wanted.keys() == {"classification", "segmentation", "boundary"}
    assert unbroken.state()["terms"] is None


def test_its_jobs_stand_in_the_graph(raw: dict[str, Any]) -> None:
    graph = write(raw)
    learner, predicted = graph.find("one_step", "agen"), graph.find("prediction", "agen")
    assert set(learner.inputs) == {"index"}  # tags alone
    assert learner.params["seed"] == 0
    assert predicted.inputs["model"] == learner.outputs["model"] == Path("results/test/one_step/agen/model.pt")
    assert graph.find("localization", "agen").inputs["model"] == learner.outputs["model"]
    order = [job.label for job in graph.jobs]
    assert order.index("one_step agen") < order.index("localization agen") < order.index("pseudo_labels agen")
    names = {dvc.name_of(job) for job in graph.jobs}
    assert {"one_step@agen", "prediction_one_step@agen", "evaluation_one_step@agen"} < names
    assert {
        "prediction_segmentations@cam",
        "prediction_segmentations@agen_two_step",
        "evaluation_segmentations@cam",
        "localization@agen",
    } < names
    assert len(names) == len(graph.jobs)
    report = graph.find("report")
    assert report.params["rows"]["agen"] == {"predictions": "predictions/agen"}
    assert report.params["rows"]["agen_two_step"]["maps"] == "localizations/agen"
    assert report.inputs["log of one_step/agen"] == learner.outputs["log"]
    assert report.inputs["scores of predictions/agen"] == graph.find("evaluation", "predictions/agen").outputs["scores"]


def test_params_name_it_everywhere(raw: dict[str, Any]) -> None:
    params = parameters.validate({**raw, "method": "agen"})
    assert references.rows(params) == {
        "cam": "segmentations/cam",
        "agen_two_step": "segmentations/agen_two_step",
        "agen": "one_step/agen",
    }
    assert references.ancestors(params, "localizations/agen") == ["one_step/agen", "localizations/agen"]
    laid = {**raw, "defaults": {"one_step": {"network": {"agen": {"delay": 3}}}}}
    assert parameters.validate(laid).one_step["agen"].network.settings.delay == 3


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({"agm": [4, 6]}, ["network.agen.agm[1]: 6 must be at least 3 and at most 5"]),
        ({"agm": [4], "coam": [4, 5]}, ["network.agen.coam: stage 5 is none of agm, which has 4"]),
        ({"agm": [], "coam": [4]}, ["network.agen.coam: stage 4 is none of agm, which has none"]),
        (
            {"delta": [0.4, 1, 0.3, 0]},
            [f"network.agen.delta[{at}]: {value} must be above 0 and below 1" for at, value in ((1, 1.0), (3, 0.0))],
        ),
        ({"shared": ["conv2"]}, ["network.agen.shared: must be a list of 2 values, not ['conv2']"]),
        ({"grdi": 4}, ["network.agen.grdi: unknown key; did you mean grid?"]),
    ],
)
def test_a_fault_is_one_line_that_names_the_key(
    raw: dict[str, Any], changes: dict[str, Any], faults: list[str]
) -> None:
    raw["one_step"]["agen"]["network"] = {"agen": AGEN | changes}
    with pytest.raises(PipelineError) as caught:
        parameters.validate(raw, "p.yaml", resolve=True)
    assert list(caught.value.lines) == [f"p.yaml: one_step.agen.{fault}" for fault in faults]


def test_backbones_are_those_that_the_network_asks_for(raw: dict[str, Any]) -> None:
    raw["one_step"]["agen"]["backbones"] = {"classification": {"name": "small"}, "body": {"name": "small"}}
    with pytest.raises(PipelineError) as caught:
        parameters.validate(raw, "p.yaml", resolve=True)
    assert list(caught.value.lines) == [
        "p.yaml: one_step.agen.backbones.segmentation: is missing",
        "p.yaml: one_step.agen.backbones.body: is none of classification, segmentation; remove it, or set it to null",
    ]
    raw["defaults"] = {"one_step": {"backbones": raw["one_step"]["agen"]["backbones"]}}
    raw["one_step"]["agen"]["backbones"] = {"body": None, "segmentation": {"name": "small"}}
    assert set(parameters.validate(raw, resolve=True).one_step["agen"].backbones) == {"classification", "segmentation"}


def test_names_that_would_collide_are_refused(raw: dict[str, Any]) -> None:
    raw["one_step"]["cam"] = raw["one_step"]["agen"]
    with pytest.raises(PipelineError, match=r"one_step\.cam: segmentations has the same name") as caught:
        parameters.validate({**raw, "method": "else"})
    assert "none of the rows cam, agen_two_step, agen" in caught.value.lines[1]


def test_the_report_shows_its_row_as_weak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw = copy.deepcopy(RAW)
    raw |= {"method": "agen", "one_step": {"agen": LEARNER}}
    raw["localizations"]["agen"] = {"model": "one_step/agen", "normalise": "none"}
    raw["pseudo_labels"]["agen"] = {
        "source": "localizations/agen",
        "rule": {"threshold": {"background": {"power": 1}}},
    }
    raw["segmentations"]["agen_two_step"] = {**raw["segmentations"]["cam"], "labels": "pseudo_labels/agen"}
    graph = experiment(raw)
    html = Path("results/drawn/report.html").read_text()
    for row in ("agen", "agen_two_step"):
        assert html.count(f'<th scope="row">{row}') >= 3  # methods, protocol, IoU by class
    assert "mIoU of agen, the selected method" in html
    assert "Training loss of one_step" in html
    table = json.loads(Path("results/drawn/metrics.json").read_text())
    assert set(table["agen"]) == {"miou", "miou_low", "miou_high", "pixel_accuracy"}
    assert {"maps_recall", "labels_miou", "miou"} < set(table["agen_two_step"])
    chains = graph.find("report").params["rows"]
    assert {metrics.supervision(chains[row]) for row in ("agen", "agen_two_step")} == {"weak"}
    logs = training_logs(graph)
    told = protocol.provenance(graph.params, "agen", logs)
    assert told["Segmentation network"] == "AGEN, small from random weights, small from random weights"
    two_step = protocol.provenance(graph.params, "agen_two_step", logs)
    assert two_step["Maps"] == "one_step/agen → localizations/agen"
    assert two_step["Map networks"] == told["Segmentation network"]
    assert two_step["Pseudo labels"] == "rule threshold, background (1 - strongest)^1, dense CRF off"
    assert told.keys() == two_step.keys()
    assert protocol.map_columns(graph.params, "localizations/agen", logs) == {"Probability": "localizations/agen"}


def test_masks_are_never_read(raw: dict[str, Any]) -> None:
    """Trained without any mask in reach, the model is the same."""
    write(raw)
    run("index", index.main, [])
    run("one_step", one_step.main, ["agen", "--device", "cpu", "--threads", "1"])
    before = sha256(Path("results/test/one_step/agen/model.pt"))
    for mask in Path("data/SegmentationClass").iterdir():
        mask.write_bytes(b"")
    run("one_step", one_step.main, ["agen", "--device", "cpu", "--threads", "1", "--force"])
    assert sha256(Path("results/test/one_step/agen/model.pt")) == before
