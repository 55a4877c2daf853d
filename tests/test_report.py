"""The report of a small experiment whose rasters are drawn, not learned."""

import base64
import copy
import json
import re
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pytest

from pipeline.config import references
from pipeline.data.sample import choose
from pipeline.report import metrics, pictures, protocol
from pipeline.runtime import Runtime
from pipeline.workflow.stage import Work
from stages import report
from tests.drawn import KIND, LAYERS, LEARNER, NAMES, OTHER, RAW, SMALL, experiment, line, training_logs

BOTH = f"{OTHER}; {KIND}"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_report_shows_every_row_and_needs_nothing_beside_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment(RAW)
    html = (place / "results/drawn/report.html").read_text()
    for row in RAW["segmentations"]:
        assert html.count(f'<th scope="row">{row}') >= 3  # methods, protocol, IoU by class
    assert "upper bound" in html
    assert not re.search(r"https?:|<script|<link|@import|url\(", html)
    sources = re.findall(r'(?:src|href)="([^"]{1,20})', html)
    assert sources
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    # 4 images: photo, mask, saliency, CAM, cumulative, refined, label; photo, mask, five rows
    assert len(re.findall(r"<img", html)) == 4 * 7 + 4 * 7
    assert html.count('<svg class="chart"') == 5
    last = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split()[0] for line in last] == ["cam", "oaa", ">", "mixed", "supervised"]


def test_metrics_files(place: Path) -> None:
    graph = experiment(RAW)
    table = json.loads((place / "results/drawn/metrics.json").read_text())
    assert list(table) == sorted(RAW["segmentations"])
    every = {*(column.key for column in metrics.COLUMNS), *metrics.INTERVAL}
    assert set(table["oaa"]) == set(table["mixed"]) == every
    assert set(table["supervised"]) == {"miou", "miou_low", "miou_high", "pixel_accuracy"}
    assert all(isinstance(value, float) and 0 <= value <= 1 for row in table.values() for value in row.values())
    scores = {
        name: json.loads(path.read_text()) for name, path in graph.find("report").inputs.items() if "scores" in name
    }
    assert table["oaa_plus"]["maps_recall"] == scores["scores of localizations/refined"]["recall"]
    assert table["oaa_plus"]["labels_ignored"] == scores["scores of pseudo_labels/oaa_plus"]["ignored"]
    assert table["mixed"]["labels_miou"] == scores["scores of mixtures/tenth"]["miou"]
    top = json.loads((place / "metrics.json").read_text())
    assert top.pop("method") == "oaa_plus"
    assert set(top.pop("iou")) == {"background", *NAMES}
    assert top == table["oaa_plus"]


def test_the_arithmetic_is_told_once_if_all_rows_share_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment(RAW)
    html = (place / "results/drawn/report.html").read_text()
    assert html.count(KIND) == 1
    assert f"<dt>Computed in</dt><dd>{KIND}</dd>" in html
    assert "different arithmetic" not in html + capsys.readouterr().out


@pytest.mark.parametrize(
    ("where", "changed", "text"),
    [
        (
            "log of classifiers/base",
            {"cam", "oaa", "oaa_plus", "mixed"},
            f"training: {BOTH}. Inference: {KIND}",
        ),
        ("log of segmentations/supervised", {"supervised"}, f"training: {BOTH}. Inference: {KIND}"),
        ("predictions/oaa", {"oaa"}, f"training: {KIND}. Inference: {BOTH}"),
        ("localizations/cam", {"cam"}, f"training: {KIND}. Inference: {BOTH}"),
    ],
)
def test_rows_computed_in_different_arithmetic_are_told_apart(
    place: Path, where: str, changed: set[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that was resumed in another arithmetic has used both."""
    job = experiment(RAW).find("report")
    path = job.inputs[where]
    if path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"arithmetic": [KIND, OTHER]}))
    else:
        with h5py.File(path, "a") as store:
            store.attrs["arithmetic"] = f"{KIND}\n{OTHER}"
    capsys.readouterr()
    report.main(Work(job, job.inputs, job.outputs, Runtime(), "key", Path("checkpoint")))
    html = job.outputs["report"].read_text()
    assert "computed in different arithmetic" in html
    assert "<dt>Computed in</dt>" not in html
    rows = dict(re.findall(r'<th scope="row">(\w+)</th>(?:<td>[^<]*</td>)*<td>([^<]*CPU[^<]*)</td></tr>', html))
    assert rows == dict.fromkeys(RAW["segmentations"], KIND) | dict.fromkeys(changed, text)
    warning = "warning: rows were computed in different arithmetic; see the report's protocol"
    assert capsys.readouterr().out.splitlines()[-1] == warning


def test_a_training_on_empty_labels_is_told_above_the_table(place: Path) -> None:
    job = experiment(RAW).find("report")
    log = job.inputs["log of segmentations/cam"]
    log.write_text(json.dumps(json.loads(log.read_text()) | {"warning": "labels.h5 ignores <all> pixels"}))
    report.main(Work(job, job.inputs, job.outputs, Runtime(), "key", Path("checkpoint")))
    html = job.outputs["report"].read_text()
    warning = '<p class="warning">segmentations/cam: labels.h5 ignores &lt;all&gt; pixels.</p>'
    assert 0 < html.index(warning) < html.index("<table")


def test_equal_inputs_give_equal_bytes(place: Path) -> None:
    graph = experiment(RAW)
    page = place / "results/drawn/report.html"
    first = page.read_bytes()
    job = graph.find("report")
    report.main(Work(job, job.inputs, job.outputs, Runtime(), "key", Path("checkpoint")))
    assert page.read_bytes() == first


def test_missing_pieces_leave_their_columns_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = {
        **RAW,
        "method": "oaa",
        "saliency": {"kind": "none"},
        "pseudo_labels": {"oaa": {"source": "classifiers/base", "rule": {"threshold": {"background": 0.3}}}},
        "segmentations": {"oaa": {"labels": "pseudo_labels/oaa", **LEARNER}},
        **{section: {} for section in ("refinements", "localizations", "mixtures")},
    }
    experiment(raw, masks=False)
    html = (place / "results/drawn/report.html").read_text()
    assert len(re.findall(r"<img", html)) == 4 * 3 + 4 * 2  # photo, cumulative attention, label; photo, prediction
    assert "no masks" in html
    assert "Saliency<small>" not in html
    assert json.loads((place / "results/drawn/metrics.json").read_text()) == {"oaa": {}}
    assert json.loads((place / "metrics.json").read_text()) == {"method": "oaa", "iou": {}}
    assert "no masks: nothing was scored" in capsys.readouterr().out


def test_layers_with_and_without_suppression_side_by_side(place: Path) -> None:
    drs = {**SMALL, "suppression": {}}
    fixed = {**SMALL, "suppression": {"delta": 0.55, "layers": ["conv4", "head"]}}
    drop = {**SMALL, "attention_drop": {}}
    experiment({**RAW, "classifiers": {"drs": drs, "wide": SMALL, "drop": drop, "fixed": fixed, "base": SMALL}})
    html = (place / "results/drawn/report.html").read_text()
    section = html.partition("<h2>Feature maps</h2>")[2].partition("</section>")[0]
    assert [re.sub("<.*?>", "", cell) for cell in re.findall(r"<th .*?</th>", section)] == [
        *("Photo", "Classifier", "conv2", "conv4", "head"),
        *4 * ["baseplain", "drsDRS, learnable", "fixedDRS, delta 0.55, in conv4, head"],
    ]
    assert section.count('alt="photo of i00') == 4
    cells = re.findall(r'<img src="data:image/jpeg;base64,([^"]*)" alt="(\w+) of (\w+), i00\d"', section)
    assert len(cells) == 4 * 3 * 3
    for encoded, layer, classifier in cells:
        found = cv2.imdecode(np.frombuffer(base64.b64decode(encoded), np.uint8), cv2.IMREAD_GRAYSCALE)
        bright = cv2.resize(found, (8, 8), interpolation=cv2.INTER_AREA) > 100
        assert np.array_equal(bright, line(classifier, LAYERS[""].index(layer) + 1) > 0)


def test_plain_classifiers_of_the_suppressed_method_are_shown(place: Path) -> None:
    amr = {**SMALL, "method": "amr"}
    experiment({**RAW, "classifiers": {"base": SMALL, "amr": amr, "both": {**amr, "suppression": {}}}})
    html = (place / "results/drawn/report.html").read_text()
    section = html.partition("<h2>Feature maps</h2>")[2].partition("</section>")[0]
    rows = [re.sub("<.*?>", "", cell) for cell in re.findall(r'<th scope="row">.*?</th>', section)]
    assert rows == 4 * ["amrplain", "bothDRS, learnable"]


def test_several_suppressed_methods_are_named(place: Path) -> None:
    amr = {**SMALL, "method": "amr", "suppression": {}}
    experiment({**RAW, "classifiers": {"base": SMALL, "amr": amr, "drs": {**SMALL, "suppression": {}}}})
    html = (place / "results/drawn/report.html").read_text()
    section = html.partition("<h2>Feature maps</h2>")[2].partition("</section>")[0]
    rows = [re.sub("<.*?>", "", cell) for cell in re.findall(r'<th scope="row">.*?</th>', section)]
    assert rows == 4 * ["baseCAM, plain", "amrAMR, DRS, learnable", "drsCAM, DRS, learnable"]


def test_classifiers_of_other_layers_leave_cells_empty(place: Path) -> None:
    drs = {**SMALL, "suppression": {}}
    experiment({**RAW, "classifiers": {"base": SMALL, "wide": drs, "drs": drs}})
    html = (place / "results/drawn/report.html").read_text()
    section = html.partition("<h2>Feature maps</h2>")[2].partition("</section>")[0]
    assert re.findall(r'scope="col">(\w+)', section)[2:] == ["conv2", "conv4", "head", "b2", "b3"]
    assert section.count("<td>none</td>") == 4 * (2 + 3 + 2)


def test_no_feature_maps_without_suppression(place: Path) -> None:
    experiment(RAW)
    assert "Feature maps" not in (place / "results/drawn/report.html").read_text()


def test_best_is_the_best_weak_row() -> None:
    rows = {"a": {"labels": "pseudo_labels/a"}, "b": {"labels": "pseudo_labels/b"}, "s": {"labels": "ground_truth"}}
    table = {"a": {"miou": 0.5, "maps_noise": 0.2}, "b": {"miou": 0.6, "maps_noise": 0.4}, "s": {"miou": 0.9}}
    assert metrics.best(table, rows) == {("b", "miou"), ("a", "maps_noise")}
    assert metrics.best({"a": table["a"], "s": table["s"]}, {"a": rows["a"], "s": rows["s"]}) == set()
    assert metrics.text_table(table, rows, "a").splitlines() == [
        "               Maps--    Segmen",
        "  method (%)    noise      mIoU",
        "> a              20.0*     50.0",
        "  b              40.0      60.0*",
        "  s                 -      90.0",
    ]


def test_map_columns_follow_the_selected_method(place: Path) -> None:
    graph = experiment(RAW, train=2, held=1, masks=False)
    params, logs = graph.params, training_logs(graph)
    assert references.ancestors(params, "localizations/refined") == [
        "classifiers/base",
        "refinements/oaa_plus",
        "localizations/refined",
    ]
    assert protocol.map_columns(params, "localizations/refined", logs) == {
        "CAM": "localizations/cam",
        "Cumulative attention": "classifiers/base",
        "Refined map": "localizations/refined",
    }
    assert "dense CRF on (4 iterations)" in protocol.provenance(params, "oaa", logs)["Pseudo labels"]
    assert "masks of 10 %" in protocol.provenance(params, "mixed", logs)["Pseudo labels"]
    assert protocol.provenance(params, "supervised", logs)["Pseudo labels"] == "ground truth"


@pytest.mark.parametrize(("method", "shown"), [("oaa", True), ("mixed", True), ("blind", False)])
def test_saliency_is_shown_where_the_labels_read_it(method: str, shown: bool, place: Path) -> None:
    raw = copy.deepcopy(RAW)
    raw["pseudo_labels"]["blind"] = {"source": "localizations/cam", "rule": {"threshold": {"background": 0.3}}}
    raw["segmentations"]["blind"] = {"labels": "pseudo_labels/blind", **LEARNER}
    experiment({**raw, "rows": [method], "method": method})
    assert ("Saliency<small>" in (place / "results/drawn/report.html").read_text()) is shown


def test_photo_and_mask_are_in_the_headings_of_a_gallery(place: Path) -> None:
    experiment(RAW)
    html = (place / "results/drawn/report.html").read_text()
    section = html.partition("<h2>Predictions</h2>")[2].partition("</section>")[0]
    headings = re.findall(r'<th scope="row">(.*?)</th>', section)
    assert [re.findall(r'alt="(\w+) of', heading) for heading in headings] == 4 * [["photo", "Mask"]]
    assert re.findall(r'<th scope="col">([\w ]+)', section) == ["Photo and mask", *RAW["segmentations"]]


def test_palette_is_that_of_pascal_voc() -> None:
    colours = pictures.palette()
    assert colours[[0, 1, 2, 15, 20, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [192, 128, 128],
        [0, 64, 128],
        [224, 224, 192],
    ]


def test_gallery_prefers_images_of_several_classes() -> None:
    class Tagged:
        def __init__(self, number: int) -> None:
            self.id = str(number)
            self.tags = (1, 2) if number % 3 == 0 else (1,)

    images: Any = [Tagged(number) for number in range(12)]
    assert [image.id for image in choose(images, 2)] == ["0", "6"]
    assert [image.id for image in choose(images, 6)] == ["0", "1", "3", "6", "7", "9"]
    assert len(choose(images, 40)) == 12
