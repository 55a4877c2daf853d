"""Rows that need masks or saliency maps that are not there are left out, and that is said once."""

from pathlib import Path

import pytest
import yaml

from pipeline.config import params as parameters
from pipeline.config import references
from pipeline.config.schema import Params
from pipeline.errors import PipelineError
from pipeline.workflow import dvc
from pipeline.workflow.graph import Graph
from pipeline.workflow.left_out import LeftOut
from tests.project import ROOT, copy, run
from tests.voc_tree import make_tree

FILE = ROOT / "params.yaml"


def load(lines: list[str], **overrides: object) -> Params:
    return parameters.load([FILE], overrides, notice=lines.append)


def test_without_masks_the_supervised_row_is_left_out() -> None:
    lines: list[str] = []
    found = load(lines, dataset={"masks": None})
    reason = "rows left out, since they need masks, but dataset.masks is null: supervised"
    assert lines == [f"{reason}; to run them, set dataset.masks to the folder of masks"]
    assert "supervised" not in references.rows(found)
    assert set(references.rows(found)) == set(references.rows(load([]))) - {"supervised"}
    jobs = {job.label for job in Graph(found).jobs}
    assert not any("supervised" in label for label in jobs)
    assert "report" in jobs


def test_without_saliency_the_rows_that_read_it_are_left_out() -> None:
    lines: list[str] = []
    found = load(lines, saliency={"kind": "none"})
    assert lines[0].startswith("rows left out, since they need saliency maps, but saliency.kind is none: cam, oaa, ")
    assert lines[1] == f"metrics.json holds the scores of {found.method}, since oaa_plus is left out"
    assert found.method in references.rows(found)
    assert {"amr", "seam", "cam_irn", "edam", "agen", "supervised"} <= set(references.rows(found))
    assert not any(block.rule.settings.needs_saliency for block in found.pseudo_labels.values())


def test_if_no_row_is_left_it_is_an_error() -> None:
    with pytest.raises(PipelineError) as caught:
        load([], dataset={"masks": None}, rows=["supervised"], method="supervised")
    assert caught.value.lines == (
        f"{FILE}: rows left out, since they need masks, but dataset.masks is null: supervised; "
        "no row is left: set dataset.masks to the folder of masks, or choose other rows",
    )


def test_every_row_remains_for_the_placeholders_of_dvc() -> None:
    raw = parameters.read([Path(FILE)], {"dataset": {"masks": None}})
    assert "supervised" in parameters.validate(raw, every_row=True).segmentations


MASKS = "row supervised needs masks, but dataset.masks is null; set dataset.masks to the folder of masks"
SALIENCY = "saliency maps, but saliency.kind is none; set saliency.kind to folder or store, or to a detector"
CASES = [
    ({"dataset": {"masks": None}}, ("segmentation", "supervised"), MASKS),
    ({"dataset": {"masks": None}}, ("evaluation", "predictions/supervised"), MASKS),
    ({"saliency": {"kind": "none"}}, ("classifier", "drop"), f"rows oaa_drop, oaa_drop_plus need {SALIENCY}"),
    (
        {"rows": ["cam"], "method": "cam"},
        ("one_step", "agen"),
        "rows agen_two_step, agen are not listed in rows; add one there",
    ),
    (
        {"rows": ["edam"], "method": "edam", "saliency": {"kind": "none"}},
        ("prediction", "cam"),
        f"row cam is not listed in rows and needs {SALIENCY.replace('; ', '; add it there and ')}",
    ),
]


@pytest.mark.parametrize(("overrides", "job", "reason"), CASES)
def test_a_job_that_is_left_out_has_a_line(overrides: dict[str, object], job: tuple[str, str], reason: str) -> None:
    left_out = LeftOut([FILE], overrides, Graph(load([], **overrides)))
    with pytest.raises(PipelineError) as caught:
        left_out.find(*job)
    assert caught.value.lines == (f"{' '.join(job)} is left out: {reason}",)
    assert left_out.find("index", "").stage == "index"
    with pytest.raises(PipelineError, match="segmentation camm: no such block; segmentation can run "):
        left_out.find("segmentation", "camm")


def test_asking_for_a_row_that_is_left_out_by_any_front_end(tmp_path: Path) -> None:
    """Snakemake goes on as without the row, and so does DVC; a stage by hand has nothing else to run."""
    folder = copy(tmp_path / "project", git=False)
    (folder / "own.yaml").write_text("dataset: {masks: null}\n")
    file = "results/demo/{}/supervised/manifest.json"
    snakemake = ("snakemake", "-n", "--configfile", "params.yaml", "own.yaml", "--")
    line = f"segmentation supervised is left out: {MASKS}"
    text = run(folder, *snakemake, file.format("segmentations"))
    assert text.count(line) == 1
    assert "job  " not in text
    text = run(folder, *snakemake, file.format("segmentations"), "results/demo/index/index.json", check=False)
    assert f"error: {line}\n" in text
    assert "Traceback" not in text
    text = run(folder, *snakemake, "results/demo/predictions/camm/manifest.json", check=False)
    assert "error: prediction camm: no such block; prediction can run " in text
    text = run(
        folder, "python", "-m", "stages.segmentation", "supervised", "--params", "params.yaml", "own.yaml", check=False
    )
    assert text == f"error: {line}\n"
    params = (folder / "params.yaml").read_text()
    assert "masks: SegmentationClass" in params
    (folder / "params.yaml").write_text(params.replace("masks: SegmentationClass", "masks: null"))
    assert run(folder, "python", "-m", "pipeline.workflow.dvc", "run", "segmentation@supervised") == f"{line}\n"


def test_dvc_leaves_the_demo_out_on_own_data(tmp_path: Path) -> None:
    folder = copy(tmp_path / "project", git=False)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    own = {"root": "data/mine", "classes": "classes.txt", "tags": "tags.json", "masks": None, "demo": None}
    params |= {"experiment": "mine", "dataset": own, "saliency": {"kind": "folder", "path": "data/mine/Saliency"}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    text = run(folder, "dvc", "repro", "demo", check=False)
    assert "\nerror: data/mine: missing (root of index); put the dataset there " in text
    make_tree(folder / "data/mine")
    text = run(folder, "dvc", "repro", "index")
    line = f"dataset.demo is null; DVC copies data/mine, which dvc.yaml calls its output, until you run {dvc.COMMAND}"
    assert text.count(f"\ndemo is left out: {line}\n") == 1
    assert "\nindex: done in " in text
    (folder / "dvc.yaml").write_text(run(folder, "python", "-m", "pipeline.workflow.dvc"))
    assert "demo" not in yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]
    assert "\ndemo" not in run(folder, "dvc", "repro", "--force", "index")
