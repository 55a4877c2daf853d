"""``wsss run``: a profile to the end, what it prints, its faults, and how it goes on after an interruption."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.project import ROOT, copy, environment
from tests.trained import command, mask
from tests.voc_tree import CLASSES, make_tree

ROW = "supervised"
WSSS = [sys.executable, "-m", "wsss"]
ENDED = """masks:      results/tiny/export/supervised/masks, and over the photos in {masks}overlays
report:     results/tiny/report.html
model:      results/tiny/predictions/supervised/model.safetensors
log:        results/tiny/logs/run.log
new photos: wsss predict results/tiny/predictions/supervised/model.safetensors PHOTOS --out FOLDER
other tools: wsss export tiny --formats coco,cvat,labelstudio,csv
""".format(masks="results/tiny/export/supervised/")


def checkout(folder: Path) -> Path:
    """A copy of the project with the command."""
    copy(folder, git=False)
    (folder / "wsss").symlink_to(ROOT / "wsss")
    return folder


def write_profile(folder: Path, epochs: int) -> None:
    """The profile ``tiny``, with one row, on 12 photos in data/tiny."""
    params = {
        "experiment": "tiny",
        "method": ROW,
        "rows": [ROW],
        "dataset": {"root": "data/tiny", "classes": "classes.txt", "tags": "tags.json", "demo": None},
        "saliency": {"kind": "none", "path": None},
        "defaults": {"segmentations": {"training": {"epochs": epochs, "batch_size": 4}}},
    }
    (folder / "profiles/tiny.yaml").write_text(yaml.safe_dump(params))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = checkout(tmp_path_factory.mktemp("run") / "project")
    make_tree(folder / "data/tiny", train=8, evaluation=4, size=(45, 67))
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*WSSS, "run", *arguments], cwd=folder, env=environment(), capture_output=True, text=True, timeout=600
    )


def begin(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*WSSS, "run", *arguments], cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True
    )


def wait_for(log: Path, text: str, process: "subprocess.Popen[str]") -> None:
    """Wait until ``text`` is in the log."""
    deadline = time.monotonic() + 300
    while not (log.exists() and text in log.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_profile_runs_to_the_end_and_goes_on_after_sigkill_and_ctrl_c(project: Path) -> None:
    write_profile(project, epochs=2000)
    log = project / "results/tiny/logs/segmentations/supervised.log"
    listed = run(project, "tiny", "-n")
    assert listed.stdout.splitlines()[:2] == ["7 of 7 jobs to run:", "  index"]

    process = begin(project, "tiny")
    wait_for(log, "epoch 3/2000", process)
    process.kill()
    out, _ = process.communicate(timeout=400)
    assert "[1/7] index: done" in out

    log.unlink()
    process = begin(project, "tiny", "--cores", "2")
    wait_for(log, "epoch 3/2000", process)  # the killed Snakemake's lock does not stop this one
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 130
    assert out == "stopped, 0 of 4 jobs done; to resume, type: wsss run tiny --cores 2\n"
    saved = re.search(r"state saved at epoch (\d+), step (\d+)", log.read_text())
    assert saved

    process = begin(project, "tiny")
    wait_for(log, f"resumes from epoch {saved[1]}, step {saved[2]}", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=400)
    assert process.returncode == 143

    write_profile(project, epochs=2)
    done = run(project, "tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "predictions/supervised on 4 evaluation images: no masks" not in done.stdout
    assert done.stdout.endswith("results/tiny/export/supervised: 12 photos segmented, 0 up to date\n" + ENDED)
    assert len(list((project / "results/tiny/export/supervised/overlays").iterdir())) == 12
    assert np.array_equal(mask(project / "results/tiny/export/supervised/masks/img_000.png").shape, (45, 67))
    for line in ENDED.splitlines()[:4]:
        for path in re.findall(r"results/\S+[^,\s]", line):
            assert (project / path).exists(), path

    again = run(project, "tiny")
    assert again.stdout == "results/tiny/export/supervised: 0 photos segmented, 12 up to date\n" + ENDED
    assert run(project, "tiny", "-n").stdout == "all 7 jobs are up to date\n"


def test_other_rows_than_the_profile_names(project: Path) -> None:
    """The rows that do not run may need saliency maps, which this profile has not."""
    write_profile(project, epochs=2)
    listed = run(project, "tiny", "--rows", "cam_irn, supervised", "-n")
    assert listed.returncode == 0, listed.stderr
    assert {"  walk cam_irn", "  segmentation cam_irn"} <= set(listed.stdout.splitlines())
    assert "oaa" not in listed.stdout


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that looks like a checkout."""
    monkeypatch.chdir(tmp_path)
    for name in ("Snakefile", "params.yaml"):
        Path(name).symlink_to(ROOT / name)
    Path("profiles").mkdir()
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The only line of a command that is refused."""
    assert command("run", *arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    return captured.err


def test_what_cannot_run_is_refused_in_one_line(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_profile(inside, epochs=2)
    assert "profiles/tiyn.yaml: no such profile; did you mean tiny?; to write one, type: wsss new" in refusal(
        capsys, "tiyn"
    )
    assert "--cores -1: must be at least 1" in refusal(capsys, "tiny", "--cores", "-1")
    assert "--rows: names no row" in refusal(capsys, "tiny", "--rows", ",")
    assert "rows: camm is none of" in refusal(capsys, "tiny", "--rows", "camm")
    assert "data/tiny: missing" in refusal(capsys, "tiny", "-n")
    Path("profiles/tiny.yaml").write_text("sede: 1\n")
    assert "sede: unknown key; did you mean seed?" in refusal(capsys, "tiny")


def test_without_a_checkout_or_the_extra(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_profile(inside, epochs=2)
    found = "wsss.run.importlib.util.find_spec"
    monkeypatch.setattr(found, lambda name: None if name == "snakemake" else object())
    assert "snakemake: not installed, but wsss run trains; pip install '.[workflow]'" in refusal(capsys, "tiny")
    monkeypatch.setattr(found, lambda name: object())
    os.unlink("Snakefile")
    assert "has no Snakefile; wsss run runs in a clone of the project" in refusal(capsys, "tiny")


@pytest.mark.slow
def test_own_photos_from_tags_to_masks(tmp_path: Path) -> None:
    """The profile of ``wsss new`` runs as it is, negatives included, and the model segments a new photo."""
    folder = checkout(tmp_path / "project")
    make_tree(folder / "data/tiny", train=12, evaluation=0, size=(45, 67))
    photos = folder / "Fotos 2024"
    photos.mkdir()
    table = ["Datei;Schlagwort"]
    for number, names in enumerate(json.loads((folder / "data/tiny/tags.json").read_text()).values()):
        (folder / f"data/tiny/JPEGImages/img_{number:03d}.jpg").rename(photos / f"Käfer {number}.JPG")
        table += [f"Käfer {number}.JPG;{CLASSES[name - 1]}" for name in names]
    for number in range(4):
        grey = np.random.default_rng(number).integers(100, 140, (45, 67, 3)).astype(np.uint8)
        Image.fromarray(grey).save(photos / f"nichts {number}.png")
    (folder / "tags.csv").write_text("\n".join(table), encoding="utf-8")
    new = ("new", photos.name, "tags.csv", "--weights", "none", "--negatives", "--leave-out", "bird")
    done = subprocess.run([*WSSS, *new], cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = run(folder, "mine")
    assert done.returncode == 0, done.stdout + done.stderr
    masks = folder / "results/mine/export/cam_irn/masks"
    assert len(list(masks.iterdir())) == 16
    assert not any(mask(masks / f"nichts {number}.png").any() for number in range(4))
    tags = json.loads((folder / "data/mine/tags.json").read_text())
    classes = (folder / "data/mine/classes.txt").read_text().split()
    assert classes == ["cat", "dog"]
    for name, names in tags.items():
        assert set(np.unique(mask(masks / f"{name}.png"))) <= {0, *(classes.index(one) + 1 for one in names)}
    predict = re.search(r"new photos: wsss (predict .*)", done.stdout)
    assert predict
    typed = [{"PHOTOS": photos.name, "FOLDER": "out"}.get(word, word) for word in predict[1].split()]
    again = [*WSSS, *typed]
    done = subprocess.run(again, cwd=folder, env=environment(), capture_output=True, text=True)
    assert "16 photos segmented" in done.stdout, done.stderr
