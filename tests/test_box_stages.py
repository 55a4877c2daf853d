"""Boxes from the classifier to the report, through the real stages."""

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml

from pipeline.config import params as parameters
from pipeline.config.dataset import Dataset
from pipeline.config.views import Boxes
from pipeline.data.build_index import build_index
from pipeline.data.index import Image, Index, write
from pipeline.data.parts import parts
from pipeline.errors import PipelineError
from pipeline.evaluation.boxes import BoxScores, mask_boxes
from pipeline.inference.recognize import class_maps
from pipeline.methods.base import Method, Output
from pipeline.report.boxes import COLUMNS, RIGHT, TRUE, WRONG, published
from pipeline.report.page import Section, page
from pipeline.stores.raster import RasterStore
from pipeline.workflow.graph import Graph
from tests.method_contract import small_classifier
from tests.project import ROOT, link_code, run_stages
from tests.trained import command
from tests.voc_tree import image_of, make_tree, minimal_params

RESULTS = Path("results/test")
CLASSIFIER = {
    "backbone": {"name": "small"},
    "head": {"convs": 1, "channels": 16, "batch_norm": True},
    "training": {"batch_size": 4, "lr": 0.05, "epochs": 6, "lr_new": 1.0},
    "accumulate": {"cells": 6, "skip_epochs": 1},
}
BOXES = {"cam": {"model": "classifiers/base"}, "two": {"model": "classifiers/two", "flip": True, "stride": 2}}


def params_of(dataset: Dataset, **changes: Any) -> dict[str, Any]:
    raw = minimal_params(dataset)
    raw |= {
        "classifiers": {
            "base": CLASSIFIER,
            "two": {**CLASSIFIER, "method": {"oaa_localization": {"reduction": "pooled"}}},
        },
        "boxes": BOXES,
    }
    for section in ("localizations", "pseudo_labels", "segmentations"):
        raw[section] = {}
    return {**raw, "rows": [], **changes}


def scores(name: str) -> Any:
    return json.loads((RESULTS / "box_scores" / name / "scores.json").read_text())


def drawn(name: str) -> Any:
    return json.loads((RESULTS / "box_scores" / name / "boxes.json").read_text())["images"]


def section(**content: Any) -> str:
    """The report's section of boxes."""
    return page(
        "title",
        "",
        [Section("Boxes", "boxes.html.j2", {"threshold": 0.2, "seeds": "", "truth": "", "gallery": None, **content})],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment without rows, whose boxes come from masks."""
    folder = tmp_path_factory.mktemp("boxes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        dataset = make_tree(Path("data"), train=12, evaluation=8, size=(40, 56))
        Path("params.yaml").write_text(yaml.safe_dump(params_of(dataset)))
        run_stages(["params.yaml"])
    return folder


@pytest.fixture
def experiment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.mark.usefixtures("experiment")
class TestExperiment:
    def test_no_job_is_for_a_row(self) -> None:
        labels = [job.label for job in Graph(parameters.load([Path("params.yaml")])).jobs]
        assert [label for label in labels if label.startswith("box")] == [
            *("box_maps cam", "box_maps two", "box_scores cam", "box_scores two")
        ]
        assert not [label for label in labels if label.startswith(("segmentation", "prediction", "pseudo"))]

    @pytest.mark.parametrize("name", BOXES)
    def test_the_scores_are_those_of_the_stored_maps(self, name: str) -> None:
        index, masks = Index(RESULTS / "index/index.json"), RasterStore(RESULTS / "ground_truth/masks.h5")
        store, scored = RasterStore(RESULTS / f"boxes/{name}/class_maps.h5"), BoxScores(0.2)
        count = 0
        for image in index.images("evaluation"):
            truth = mask_boxes(masks.get(image.id), image.tags, single=True)
            assert bool(truth) == (len(image.tags) == 1)
            if truth:
                count += 1
                maps = store.maps(image.id)
                boxes = scored.update(image.size, maps, list(maps)[:3], truth)
                found = drawn(name)[image.id]
                assert found["highest"] == list(maps)[:3]
                assert found["truth"] == {str(k): box.tolist() for k, box in truth.items()}
                assert found["boxes"] == {str(k): next(iter(box.tolist()), None) for k, box in boxes.items()}
        found = scores(name)
        assert found["images"] == len(drawn(name)) == count == 4
        assert found["truth"] == "masks of single-object images"
        for key in ("known", "top_1_localization", "max_box_accuracy"):
            assert found[key] == pytest.approx(scored.summary()[key], abs=1e-6)

    def test_the_report_shows_scores_and_boxes(self) -> None:
        page = (RESULTS / "report.html").read_text()
        assert "MaxBoxAccV2" in page
        assert "masks of single-object images" in page
        assert page.count('alt="boxes of cam in ') == page.count('alt="boxes of two in ') == 4
        name, found = next(iter(drawn("cam").items()))
        (encoded,) = re.findall(rf'src="data:image/jpeg;base64,([^"]*)" alt="boxes of cam in {name};', page)
        picture = cv2.imdecode(np.frombuffer(base64.b64decode(encoded), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        ((left, top, *_),) = next(iter(found["truth"].values()))
        highest = str(found["highest"][0])
        colour = RIGHT if highest in found["truth"] else WRONG
        factor = picture.shape[1] / 56
        corners = [(round(left * factor), round(top * factor), TRUE)]
        x, y, *_ = found["boxes"][highest]
        corners.append((round(x * factor), round(y * factor), colour))
        for x, y, wanted in corners[-1:]:  # the true box may lie below the other
            area = picture[max(0, y - 2) : y + 3, max(0, x - 2) : x + 40].reshape(-1, 3).astype(int)
            assert np.abs(area - wanted).max(1).min() < 60

    def test_published_figures_stand_below_those_of_cub_alone(self) -> None:
        html = (RESULTS / "report.html").read_text()
        assert "published: OAA" not in html
        rows = published()
        (heading,) = re.findall(r'<th scope="col">Boxes</th>(.*?)</tr>', html)
        assert {tuple(cells) for cells in rows.values()} == {tuple(re.findall(r">([^<]+)</th>", heading))}
        shown = section(table=rows | {"ours": rows["published: CAM"]}, is_cub=True)
        assert re.search(r"published: OAA</th><td>–</td><td>56.23</td><td>69.68</td><td>–</td>", shown)
        assert "The published rows are those of" in shown

    def test_metrics_hold_them_without_rows(self) -> None:
        found = json.loads(Path("metrics.json").read_text())
        assert found.keys() == {"boxes/cam", "boxes/two"}
        assert found == json.loads((RESULTS / "metrics.json").read_text())
        assert found["boxes/two"]["known"] == scores("two")["known"]


FOLDERS = {0: "box_scores", 5: "seed_5/box_scores", 7: "seed_7/box_scores"}  # by seed


def test_several_seeds_have_a_mean_and_a_range(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "seeds")
    monkeypatch.chdir(tmp_path / "seeds")
    raw = yaml.safe_load(Path("params.yaml").read_text())
    Path("params.yaml").write_text(yaml.safe_dump(raw | {"seeds": [0, 5, 7]}))
    run_stages(["params.yaml"])
    printed = capsys.readouterr().out
    assert "box_maps cam: up to date" in printed
    files = {seed: RESULTS / folder / "cam/scores.json" for seed, folder in FOLDERS.items()}
    each = {seed: json.loads(path.read_text()) for seed, path in files.items()}
    values = {key: [found[key] for found in each.values()] for key in COLUMNS}
    assert any(len(set(of_seeds)) > 1 for of_seeds in values.values())

    found = json.loads(Path("metrics.json").read_text())["boxes/cam"]
    page = (RESULTS / "report.html").read_text()
    assert found["images"] == 4
    for key, of_seeds in values.items():
        assert found[key] == pytest.approx(np.mean(of_seeds), abs=1e-6)
        assert (found["least"][key], found["most"][key]) == (min(of_seeds), max(of_seeds))
        assert [found["seeds"][str(seed)][key] for seed in each] == of_seeds
        mean, spread = f"{100 * found[key]:.1f}", f"{100 * min(of_seeds):.1f}–{100 * max(of_seeds):.1f}"
        tooltip = ", ".join(f"seed {seed}: {100 * value:.1f}" for seed, value in zip(each, of_seeds, strict=True))
        assert f'<td title="{tooltip}">{mean}<small>{spread}</small></td>' in page
        if key == "known":
            assert re.search(rf"^  boxes/cam .* {mean} .* {spread}$", printed, re.MULTILINE)
    assert "Each is the mean over the seeds 0, 5, 7" in page
    assert "boxes: means over the seeds 0, 5, 7\n" in printed
    halves = [scored["max_box_accuracy_at"]["0.5"] for scored in each.values()]
    thresholds = ", ".join(f"{half['threshold']:.2f}" for half in halves)
    assert f"IoU 0.5: {100 * np.mean([half['accuracy'] for half in halves]):.1f} at {thresholds}" in page


def test_true_boxes_may_come_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all images, in pixels of the file: the images are reduced to a quarter of their pixels."""
    monkeypatch.chdir(tmp_path)
    link_code(tmp_path)
    dataset = make_tree(Path("data"), train=6, evaluation=3, size=(80, 112))
    tags = json.loads(Path("data/tags.json").read_text())
    truth = {name: [[tags[name][0], 4, 8, 20, 16.5]] for name in list(tags)[6:]}
    Path("data/boxes.json").write_text(json.dumps(truth))
    raw = params_of(dataset)
    raw["dataset"] |= {"boxes": "boxes.json", "masks": None, "working_megapixels": 40 * 56 / 1e6}
    raw["classifiers"]["base"] = {**CLASSIFIER, "training": {**CLASSIFIER["training"], "epochs": 1}}  # type: ignore[dict-item]
    raw["boxes"] = {"cam": BOXES["cam"]}
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    run_stages(["params.yaml"])
    found = drawn("cam")
    assert list(found) == list(truth)
    assert [image["truth"] for image in found.values()] == [
        {str(boxes[0][0]): [[2, 4, 12, 12.25]]} for boxes in truth.values()
    ]
    assert scores("cam")["truth"] == "dataset.boxes"
    assert scores("cam")["pairs"] == 3


def test_boxes_run_beside_rows_but_not_among_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw = minimal_params(make_tree(Path("data")))
    row = next(iter(raw["segmentations"]))
    raw["segmentations"]["other"] = raw["segmentations"][row]
    raw |= {"boxes": {"cam": {"model": "classifiers/extra"}}, "rows": [row, "other"], "first": [row], "method": row}
    raw["classifiers"]["extra"] = CLASSIFIER
    graph = Graph(parameters.validate(raw))
    assert "classifier extra" not in [job.label for job in graph.first]
    assert {"classifier extra", "box_scores cam"} <= {job.label for job in graph.jobs}
    assert graph.find("report").inputs["boxes of box_scores/cam"] == RESULTS / "box_scores/cam/boxes.json"


def test_wsss_run_needs_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert command("run", "demo_boxes", "--dry-run") == 1
    said = capsys.readouterr().err
    assert "profiles/demo_boxes.yaml: has no rows, so it trains no network whose masks wsss run could write" in said
    assert said.endswith("snakemake --cores all --configfile params.yaml profiles/demo_boxes.yaml\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"boxes": {}}, "rows: there is none, and no boxes either; add a row or a block of boxes"),
        (
            {"boxes": {"x": {"model": "localizations/x"}}},
            "boxes.x.model: refers to localizations/x, which is none of classifiers/base, classifiers/two",
        ),
        ({"boxes": {"x": {"model": "classifiers/base", "scales": []}}}, "boxes.x.scales: is empty; add at least one"),
        ({"box_test": {"threshold": 1.0}}, "box_test.threshold: 1.0 must be at least 0 and below 1"),
    ],
)
def test_wrong_params_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(PipelineError) as caught:
        parameters.validate(params_of(make_tree(tmp_path / "data"), **change))
    assert caught.value.lines == (f"params.yaml: {said}",)


class TestIndex:
    """``dataset.boxes``, as the index reads it."""

    def faults(self, root: Path, boxes: Any) -> list[str]:
        dataset = make_tree(root, train=2, evaluation=2)
        (root / "boxes.json").write_text(boxes if isinstance(boxes, str) else json.dumps(boxes))
        with pytest.raises(PipelineError) as caught:
            build_index(Dataset(**{**vars(dataset), "boxes": "boxes.json"}))
        return [line.removeprefix(f"{root}/") for line in caught.value.lines]

    def test_all_faults_are_named_at_once(self, tmp_path: Path) -> None:
        """Images 2 and 3, of 32 x 24 pixels, have class 3, and classes 1 and 2."""
        boxes = [
            *([3, 0, 0, 33.1, 24], [3, -1.5, 0, 4, 4], [3, 5, 5, 0, 4], [4, 1, 1, 4, 4], [1, 1, 1, 4, 4]),
            *([3, 1, 1, 4], [3, "1", 1, 4, 4], [3, float("nan"), 1, 4, 4]),
        ]
        ending = "; correct it"
        assert self.faults(tmp_path, {"img_002": boxes, "img-003": [[1, 1, 1, 4, 4]]}) == [
            f"boxes.json: img_002: the box [3, 0, 0, 33.1, 24] lies outside of its image of 32x24 pixels{ending}",
            f"boxes.json: img_002: the box [3, -1.5, 0, 4, 4] lies outside of its image of 32x24 pixels{ending}",
            f"boxes.json: img_002: the box [3, 5, 5, 0, 4] has no area{ending}",
            f"boxes.json: img_002: the box [4, 1, 1, 4, 4] has a class id that is not in 1..3{ending}",
            f"boxes.json: img_002: the box [1, 1, 1, 4, 4] has a class that is not among the tags of the image{ending}",
            f"boxes.json: img_002: the box [3, 1, 1, 4] is not [class id, left, top, width, height]{ending}",
            f'boxes.json: img_002: the box [3, "1", 1, 4, 4] is not [class id, left, top, width, height]{ending}',
            f"boxes.json: img_002: the box [3, NaN, 1, 4, 4] has no area{ending}",
            "boxes.json: has no box of the evaluation image img_003; did you mean img-003?",
        ]

    @pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000])
    def test_another_file_is_one_line(self, content: str, tmp_path: Path) -> None:
        (line,) = self.faults(tmp_path, content)
        assert line.startswith("boxes.json: ")
        assert line.endswith("; correct it, or set dataset.boxes to null")

    def test_boxes_are_cut_off_at_the_rim_and_hidden_from_trainings(self, tmp_path: Path) -> None:
        dataset = make_tree(tmp_path, train=2, evaluation=1)
        boxes = {"img_002": [[3, -0.5, 0, 33, 24.9]], "img_000": [[1, 0, 0, 4, 4]]}
        (tmp_path / "boxes.json").write_text(json.dumps(boxes))
        raw = build_index(Dataset(**{**vars(dataset), "boxes": "boxes.json"})).index
        write(tmp_path / "index.json", raw)
        index = Index(tmp_path / "index.json")
        assert image_of(index, "img_002").boxes == ((3, 0, 0, 32, 24),)
        assert image_of(index, "img_000").boxes == ()
        holding = [name for name, part in parts(raw) if '"boxes": [' in json.dumps(part)]
        assert holding == ["true_boxes"]


class Fixed(Method):
    """Scores and maps that depend on the mean of a corner of the image, at a stride of 8."""

    map_name = "fixed"

    def describe(self) -> str:
        return "fixed"

    def new_layers(self) -> Any:
        return []

    def layers(self) -> Any:
        return {}

    def forward(self, images: torch.Tensor, occluded: torch.Tensor | None = None) -> Output:
        corner = images[:, 0, :8, :8].mean((1, 2))
        logits = torch.stack([corner * k for k in (1, -2, 3, 0, 0.5, -1, 2)], 1)
        maps = images[:, :1, ::8, ::8] + torch.zeros(7)[None, :, None, None]
        return Output(logits, maps)


def test_class_maps_are_those_of_the_highest_classes_then_of_the_tags(tmp_path: Path) -> None:
    """Seven classes; the scores of the image and of its mirror image are averaged."""
    pixels = np.zeros((24, 32, 3), np.uint8)
    pixels[:, -8:] = 255  # the mean of both corners is positive, that of the left one is not
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    network = Fixed(small_classifier(), 7)
    for tags, expected in [((2, 7), [3, 7, 1, 5, 4, 2]), ((), [3, 7, 1, 5, 4]), ((2, 6), [3, 7, 1, 5, 4, 2, 6])]:
        image = Image("a", tmp_path / "a.png", 24, 32, tags, None, None)
        rows = list(class_maps(network, [image], Boxes("classifiers/x", flip=True, stride=8), torch.device("cpu")))
        assert [class_id for _, class_id, _ in rows] == expected
        assert {raster.shape for _, _, raster in rows} == {(3, 4)}
        assert all(raster.max() == 255 for _, _, raster in rows)
        first = rows[0][2]
        assert first[:, 3].min() == 255  # flips are undone
        assert first[:, :3].max() == 0
