"""Every command in the documents is run, dry-run, covered by another test, or marked with what it needs; links work."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from PIL import Image

from pipeline.config import params as parameters
from pipeline.config import references
from tests.documents import DOCUMENTS, commands, fences, headings, links, spans
from tests.project import ROOT, copy, environment, run, run_stages
from tests.test_orchestration import edit, shrink
from tests.voc_tree import make_tree

MODEL = "results/demo/predictions/oaa/model.safetensors"
PLANNED = "This was a dry-run"
NOTHING = "Nothing to be done"


@dataclass(frozen=True)
class Run:
    """Runs in a folder with the results of a small demo.

    Attributes:
        expected: part of the output, or a file that is there afterwards.
        replaced: what a reader replaces in the command, and by what.
    """

    expected: str
    replaced: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Dry:
    """Runs in a fresh checkout with ``option`` added, which prevents the work."""

    expected: str = PLANNED
    option: str = "-n"
    status: int = 0


@dataclass(frozen=True)
class Covered:
    """Another test runs it: a file and a function, and what stands in its source."""

    test: str
    part: str


@dataclass(frozen=True)
class Needs:
    """It cannot run here."""

    what: str


@dataclass(frozen=True)
class Mention:
    """No command to type as it stands: the name of one."""


SNAKEMAKE = "snakemake --cores all"
MINI = "--configfile params.yaml profiles/voc12_mini.yaml"
PROFILE = f"{SNAKEMAKE} --configfile params.yaml profiles"
ORCHESTRATION = "test_orchestration.py"
CHECKS: dict[str, Run | Dry | Covered | Needs | Mention] = {
    ". .venv/bin/activate": Run("", ((".venv", sys.prefix),)),
    "docker run --shm-size 1g": Needs("Docker"),
    "make install": Dry("pip install --no-deps --editable ."),
    "make reproduce": Dry("python -m pipeline.workflow.reproduce"),
    "make test": Dry("python -m pytest"),
    "make audit": Dry(".ci/audit.py"),
    "pip install 'wsss[photos]'": Covered("test_environment.py::test_the_extras", '"photos"'),
    "pip install .": Covered("test_wheel.py::test_the_wheel_segments_a_photo_in_an_empty_environment", '"install"'),
    "git init": Covered(f"{ORCHESTRATION}::finished", '"git", "init"'),
    # Snakemake
    SNAKEMAKE: Run(NOTHING),
    f"{SNAKEMAKE} -n": Run(NOTHING),
    "snakemake -n": Run(NOTHING),
    f"{SNAKEMAKE} --config 'rows=[cam,oaa]' method=cam": Dry(),
    f"{SNAKEMAKE} --config 'seeds=[1,2,3]'": Dry("results/demo/seed_3/predictions/"),
    "python -m pipeline.workflow.reproduce --config 'seeds=[1,2,3]'": Covered(
        "test_seeds.py::test_a_seed_is_added_and_nothing_else_runs_again", '"pipeline.workflow.reproduce", "--config"'
    ),
    "python -m pipeline.report.per_class results/demo/seed_2": Covered("test_seeds.py", "per_class"),
    "wsss export demo/seed_2/oaa": Covered("test_seeds.py", '"wsss", "export", "demo/seed_2/oaa"'),
    f"{PROFILE}/tables/oaa_4.yaml": Dry("tables oaa_4: 11 trainings"),
    f"{PROFILE}/tables/*.yaml": Dry("tables agen_1, agen_2"),
    **{
        f"snakemake --cores 2 {MINI} {tables}": Dry("correct dataset.root", status=1)
        for tables in ("profiles/tables/oaa_4.yaml", "profiles/tables/oaa_13.yaml profiles/tables/oaa_fig_11.yaml")
    },
    f"{PROFILE}/voc2012.yaml profiles/tables/oaa_4.yaml": Dry(),
    "snakemake --cores 2 --configfile params.yaml profiles/demo_boxes.yaml": Dry(),
    f"snakemake --cores 2 {MINI}": Dry("correct dataset.root", status=1),
    **{
        f"snakemake --cores 2 {MINI} profiles/voc12_mini_{name}.yaml": Dry("correct dataset.root", status=1)
        for name in ("timm", "boxes")
    },
    f"snakemake --cores 2 {MINI} profiles/voc12_mini_boxes.yaml --config 'seeds=[1,2,3]'": Dry(
        "correct dataset.root", status=1
    ),
    f"{PROFILE}/voc2012.yaml": Dry("download"),
    f"{PROFILE}/voc2012.yaml profiles/coco_stuff.yaml": Dry("unpack COCO-Stuff 10k v1.1 there", status=1),
    "snakemake --cores all --configfile params.yaml profiles/voc2012.yaml profiles/cub.yaml": Dry(
        "unpack CUB_200_2011.tgz there", status=1
    ),
    f"{PROFILE}/voc2012.yaml profiles/extra.yaml": Dry(),
    f"{PROFILE}/mine.yaml": Dry(),
    "snakemake --configfile params.yaml profiles/voc2012.yaml --profile profiles/slurm": Dry(),
    # DVC
    "dvc config --local core.no_scm true": Covered(
        "test_zip.py::test_without_git_everything_works_and_the_documents_say_what_dvc_needs", "core.no_scm true"
    ),
    "dvc config --local core.hardlink_lock true": Run(""),
    "dvc repro": Covered(f"{ORCHESTRATION}::reproduced", '"dvc", "repro"'),
    "dvc exp run -S '+rows=[cam,oaa]' -S method=cam": Covered(
        f"{ORCHESTRATION}::test_an_experiment_may_have_fewer_rows", '"dvc", "exp", "run"'
    ),
    **{
        f"dvc {arguments}": Covered(f"{ORCHESTRATION}::test_experiments_are_compared_number_by_number", part)
        for arguments, part in {
            "exp run -n cam -S method=cam": '"exp", "run", "--name", "cam", "--set-param", "method=cam"',
            "exp run -n oaa_plus -S method=oaa_plus": '"exp", "run", "--name", "oaa", "--set-param", "method=oaa"',
            "metrics diff cam oaa_plus": '"metrics", "diff", "cam", "oaa"',
        }.items()
    },
    "dvc metrics show": Run("cam.miou"),
    "dvc plots show": Run("dvc_plots/index.html"),
    "dvc status": Covered(f"{ORCHESTRATION}::test_after_snakemake_neither_tool_has_anything_to_do", '"dvc", "status"'),
    **dict.fromkeys(("dvc checkout", "dvc commit", "dvc exp", "dvc metrics diff", "dvc pull"), Mention()),
    # By hand
    "python -m stages.classifier base": Run("classifier base: up to date"),
    "python -m stages.index": Run("index: up to date"),
    "python -m pipeline.workflow.graph params.yaml | sh -e": Run(
        "python -m stages.report", (("| sh -e", "| sed 's/^/would run: /'"),)
    ),
    "python -m pipeline.workflow.dvc > dvc.yaml": Covered("test_definitions.py", "dvc.yaml"),
    "python -m pipeline.workflow.reproduce": Covered("test_reproduce.py", "reproduce"),
    # wsss
    "python -m wsss": Run("usage: wsss", (("wsss", "wsss --help"),)),
    "wsss new PHOTOS TAGS --name mine": Covered("test_new.py::test_every_kind_of_tags", '"--name", "pets"'),
    "wsss run mine": Covered(
        "test_run.py::test_a_profile_runs_to_the_end_and_goes_on_after_sigkill_and_ctrl_c", 'begin(project, "tiny")'
    ),
    f"wsss predict {MODEL} PHOTOS --out masks": Run("3 photos segmented", (("PHOTOS", "photos"), ("masks", "out1"))),
    "wsss predict MODEL NEW_PHOTOS --out masks": Run(
        "3 photos segmented", (("MODEL", MODEL), ("NEW_PHOTOS", "photos"), ("masks", "out2"))
    ),
    "wsss predict MODEL photos more/one.jpg list.txt --out masks --formats png,overlay,csv --tags tags.csv": Run(
        "5 photos segmented", (("MODEL", MODEL), ("--out masks", "--out out3"))
    ),
    "find photos -name '*.jpg' | wsss predict MODEL - --out masks": Run(
        "3 photos segmented", (("MODEL", MODEL), ("masks", "out4"))
    ),
    "wsss export demo/oaa --formats png,overlay,coco,cvat,labelstudio,csv,probabilities": Run(
        "results/demo/export/oaa/coco_rle.json"
    ),
    "wsss export demo": Run("results/demo/export/oaa/masks"),
    "wsss export mine --formats coco,cvat,labelstudio": Run("results/demo/export/oaa/cvat.xml", (("mine", "demo"),)),
    "wsss export results/demo/pseudo_labels/oaa/labels.h5": Run("results/demo/pseudo_labels/oaa"),
    "wsss export results/demo/pseudo_labels/oaa/labels.h5 --formats png,overlay": Run("results/demo/pseudo_labels/oaa"),
    "wsss export results/demo/localizations/cam/maps.h5 --formats probabilities": Run("results/demo/localizations/cam"),
    **dict.fromkeys(("wsss new", "wsss new --skip-broken", "wsss run", "wsss predict"), Mention()),
    "wsss new --saliency rembg": Needs("rembg, which downloads its network"),
    "python -m tests.manual.own_photos": Needs("../shared/data/voc12_mini and about 15 minutes"),
    "python -m tests.fuzz": Needs("about an hour; tests/test_fuzz.py runs some cases of each reader"),
    # Benchmarks take minutes; they must start
    **{
        f"python -m benchmarks.{name}": Dry("usage: ", "--help")
        for name in (
            *("accumulator", "agen_memory", "boundary", "collaboration", "confusion", "crf", "cuda", "deeplab_memory"),
            *("kill classifier base", "kill classifier base --kills 5", "kill segmentation supervised --kills 5"),
            *(
                "growth",
                "inference",
                "loading",
                "loop",
                "memory",
                "suppression",
                "stages",
                "stages results/demo",
                "training",
                "walk",
            ),
        )
    },
}


def of(kind: type) -> list[str]:
    return [command for command, check in CHECKS.items() if isinstance(check, kind)]


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a reader would, in the environment of this test."""
    typed = re.sub(r"(^|\| )wsss ", r"\1python -m wsss ", command)
    return subprocess.run(["sh", "-c", typed], cwd=folder, env=environment(), capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh checkout, with the profiles of the documents and the folders that they name."""
    folder = copy(tmp_path_factory.mktemp("documents") / "checkout", git=False)
    for part in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / part, folder)
    for name, text in profiles().items():
        (folder / name).write_text(text)
    make_tree(folder / "data/mine")
    (folder / "data/caltech/cat").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with all results of a small demo, and the files that the examples name."""
    folder = copy(tmp_path_factory.mktemp("documents") / "demo", git=True)
    (folder / "wsss").symlink_to(ROOT / "wsss")
    edit(folder, shrink)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_stages(["params.yaml"])
    photos = sorted((folder / "data/demo/JPEGImages").iterdir())[:5]
    places = ("photos/a.jpg", "photos/b.jpg", "photos/sub/c.jpg", "more/one.jpg", "x.jpg")
    for photo, place in zip(photos, places, strict=True):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder / place)
    (folder / "list.txt").write_text("x.jpg\n")
    (folder / "tags.csv").write_text("filename,tags\na.jpg,crab\none.jpg,eel\n")
    run(folder, "git", "init", "--quiet")
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--message", "Small demo")
    run(folder, "snakemake", "--quiet", "all")  # which tells DVC of the results
    return folder


def profiles() -> dict[str, str]:
    """The profiles in the documents, by their path."""
    found = {}
    for fence in fences():
        if fence.language == "yaml" and (name := re.match(r"# (profiles/\w+\.yaml)", fence.text)):
            found[name[1]] = fence.text
    return found


def test_every_command_has_a_check_and_every_check_a_command() -> None:
    documented = commands()
    missing = {command: [str(path) for path in paths] for command, paths in documented.items() if command not in CHECKS}
    assert missing == {}, "each command of the documents needs an entry in CHECKS"
    assert CHECKS.keys() - documented.keys() == set()


def test_every_fence_names_its_language_and_no_command_is_abbreviated() -> None:
    assert [fence for fence in fences() if fence.language not in ("sh", "text", "python", "yaml")] == []
    assert [span for path in DOCUMENTS for span in spans(path) if span.startswith("...")] == []


@pytest.mark.slow
@pytest.mark.parametrize("command", of(Run))
def test_it_runs(command: str, demo: Path) -> None:
    check = CHECKS[command]
    assert isinstance(check, Run)
    typed = command
    for old, new in check.replaced:
        assert old in typed
        typed = typed.replace(old, new, 1)
    done = shell(typed, demo)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert check.expected in output or (demo / check.expected).exists(), output


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in of(Dry) if "benchmarks" not in command])
def test_it_would_run(command: str, checkout: Path) -> None:
    check = CHECKS[command]
    assert isinstance(check, Dry)
    done = shell(f"{command} {check.option}", checkout)
    assert done.returncode == check.status, done.stdout + done.stderr
    assert check.expected in done.stdout + done.stderr


@pytest.mark.parametrize("command", [command for command in of(Dry) if "benchmarks" in command])
def test_the_benchmark_starts(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, *arguments = command.removeprefix("python -m ").split()
    monkeypatch.setattr(sys, "argv", [module, *arguments, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__")
    assert stop.value.code == 0
    help_ = capsys.readouterr().out
    assert all(option in help_ for option in arguments if option.startswith("--"))


@pytest.mark.parametrize("command", of(Covered))
def test_another_test_runs_it(command: str) -> None:
    check = CHECKS[command]
    assert isinstance(check, Covered)
    file, _, name = check.test.partition("::")
    source = (ROOT / "tests" / file).read_text()
    if name:
        body = re.search(rf"^def {name}\(.*?(?=^(?:def|class|@)|\Z)", source, re.MULTILINE | re.DOTALL)
        assert body, check.test
        source = body[0]
    assert check.part in source


def test_what_the_mini_profile_lacks_is_named_with_its_fix(checkout: Path) -> None:
    """In a clone there is neither the dataset nor the weights."""
    done = shell("snakemake --cores 2 --configfile params.yaml profiles/voc12_mini.yaml -n", checkout)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [re.sub(r"^error: (\S+): .*; ", r"\1; ", line) for line in errors] == [
        "../shared/data/voc12_mini; put the dataset there (data/README.md has the layout), or correct dataset.root",
        "../shared/data/voc12_mini/Saliency; put the maps there, or correct saliency.path",
        *(
            f"../shared/weights/{name}_fp16.pth; put the file there, or correct backbone.weights: 'imagenet' downloads"
            f" {library}'s, if any, null starts at random"
            for name, library in (("mobilenet_v2_imagenet", "torchvision"), ("tf_efficientnet_lite2", "timm"))
        ),
    ]


def test_profiles_in_the_documents_are_valid() -> None:
    assert profiles().keys() == {"profiles/mine.yaml", "profiles/extra.yaml"}
    for text in profiles().values():
        Path("profile.yaml").write_text(text)
        under = ["params.yaml", *(["profiles/voc2012.yaml"] if "voc2012" in text else [])]
        parameters.load([*(ROOT / file for file in under), Path("profile.yaml")])


def test_the_five_lines_are_a_row() -> None:
    text, variants = [
        fence.text for fence in fences() if (fence.document.name, fence.language) == ("METHODS.md", "yaml")
    ]
    Path("row.yaml").write_text(text)
    assert len(text.splitlines()) == 5
    assert "r50_plus" in parameters.load([ROOT / "params.yaml", Path("row.yaml")]).segmentations
    assert yaml.safe_load(text)["segmentations"] == {"r50_plus": {"labels": "pseudo_labels/r50_plus"}}
    Path("variants.yaml").write_text(f"{variants}method: mild\nfirst: []\n")
    params = parameters.load([ROOT / "params.yaml", Path("variants.yaml")])
    assert list(references.rows(params)) == ["drs_fixed", "mild", "oaa", "longer"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("document", ["README.md", "docs/LIBRARY.md"])
def test_the_python_examples_run(document: str, experiment: Path) -> None:
    """On the classes cat, dog and bird."""
    shutil.copy(next((experiment / "results").rglob("model.safetensors")), "model.safetensors")
    shutil.copy(next((experiment / "data/JPEGImages").iterdir()), "photo.jpg")
    (code,) = [fence.text for fence in fences() if str(fence.document) == document and fence.language == "python"]
    names = {"one": "photo.jpg", "two": Image.open("photo.jpg"), "paths": ["photo.jpg"] * 2}
    exec(compile(code, document, "exec"), names)
    assert names["result"].mask.shape == (45, 67)  # type: ignore[attr-defined]


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document: Path) -> None:
    for target in links(document):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file) if file else document
        resolved = Path(os.path.normpath(path))
        assert (ROOT / resolved).exists(), target
        assert not anchor or anchor in headings(resolved), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_files_that_are_named_exist(document: Path) -> None:
    folders = ("docs", "tests", "pipeline", "stages", "profiles", "benchmarks", "wsss")
    for span in spans(document):
        if re.fullmatch(rf"({'|'.join(folders)})/[\w/.]+\.\w+", span) and span not in profiles():
            assert (ROOT / span).exists(), span


def test_the_picture_is_small() -> None:
    assert (ROOT / "docs/strip.png").stat().st_size < 150_000
    with Image.open(ROOT / "docs/strip.png") as picture:
        assert picture.size[0] <= 1000
