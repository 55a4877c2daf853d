"""What a stage and a plan import, and how long they take to begin."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from pipeline.config import params as parameters
from pipeline.config.registry import plain
from pipeline.config.stage_table import STAGES
from pipeline.training import optimizers
from pipeline.workflow import closure, settings
from pipeline.workflow.graph import Graph
from tests import project
from tests.faults import TABLES, small_params

# Of torch, for compilation and export; and of packages that are installed, but only Snakemake and DVC use
NEVER = {"torch._dynamo", "torch._inductor", "torch.onnx", "sympy", "torchvision", "pandas", "matplotlib", "networkx"}
# All runs have numpy; these are what takes more than 50 ms, and the stages that need it
HEAVY = {
    "torch": {stage.name for stage in STAGES.values() if stage.gpu},
    "jinja2": {"report", "first_report", "table"},
    "scipy": set[str](),
    "pydensecrf": {"pseudo_labels", "prediction"},
    "pycocotools": set[str](),
}
# They need an archive; they share all imports with demo but zipfile, h5py and the decoder of photos
SKIPPED = ("download", "coco_stuff", "cub")
RUN = """
import json, runpy, sys, time
sys.argv = ["-m", *sys.argv[1:]]
name = sys.argv.pop(1)
try:
    runpy.run_module(name, run_name="__main__", alter_sys=True)
finally:
    print("MODULES", json.dumps(sorted(sys.modules)))
"""
BEGIN = """
import sys, time
start = time.process_time()
import torch
imported = time.process_time()
from pipeline.workflow import stage
stage.execute = lambda *arguments: print("SECONDS", imported - start, time.process_time() - imported)
import runpy
name = sys.argv.pop(1)
runpy.run_module(name, run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every job of a small experiment has run."""
    folder = tmp_path_factory.mktemp("startup")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("params.yaml").write_text(yaml.safe_dump(small_params()))
        project.run_stages(["params.yaml"])
        Path("tables.yaml").write_text(yaml.safe_dump({"rows": None, "tables": TABLES}))
        project.run_stages(["params.yaml", "tables.yaml"], until="table maps")
    project.link_code(folder)
    shutil.copy(project.ROOT / "Snakefile", folder)
    shutil.copytree(project.ROOT / "profiles", folder / "profiles")
    return folder


def python(folder: Path, code: str, *arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def job_of(folder: Path, stage: str) -> list[str]:
    files = ["params.yaml", "tables.yaml"] if stage == "table" else ["params.yaml"]
    graph = Graph(parameters.load([folder / file for file in files]))
    job = next(job for job in graph.jobs if job.stage == stage)
    return [f"stages.{stage}", *filter(None, [job.name]), "--params", *files]


@pytest.mark.parametrize("stage", [name for name in STAGES if name not in SKIPPED])
def test_a_stage_imports_only_what_it_uses(finished: Path, stage: str) -> None:
    out = python(finished, RUN, *job_of(finished, stage), "--force", "--device", "cpu")
    assert "done in" in out
    modules = set(json.loads(out.rpartition("MODULES ")[2]))
    assert not NEVER & modules
    for package, stages in HEAVY.items():
        if stage not in stages:
            assert package not in modules


@pytest.mark.parametrize("stage", [name for name, stage in STAGES.items() if stage.gpu])
def test_a_stage_begins_within_a_second_of_torchs_import(finished: Path, stage: str) -> None:
    """In processor time, the best of three, since other processes may slow this one."""
    seconds = []
    while not seconds or (min(seconds) >= 1 and len(seconds) < 3):
        seconds.append(float(python(finished, BEGIN, *job_of(finished, stage), "--device", "cpu").split()[2]))
    assert min(seconds) < 1


class TestPlanning:
    """A plan whose settings are cached imports no torch, whether jobs are stale or not."""

    SNAKEMAKE = "import sys; from snakemake.cli import main; main(['-n', '--cores', '1'])"
    DVC = "from pipeline.workflow.dvc import run; run('segmentation@cam')"
    BLOCKED = "raise ImportError('torch is blocked')"

    def plan(self, folder: Path, code: str, blocked: bool) -> str:
        packages = folder / "packages" / "torch"
        packages.mkdir(parents=True, exist_ok=True)
        (packages / "__init__.py").write_text(self.BLOCKED)
        path = os.pathsep.join([str(packages.parent)] * blocked + [str(folder)])
        code = f"import sys\ntry:\n    {code}\nexcept SystemExit as stop:\n    assert not stop.code\n"
        return python(folder, code, PYTHONPATH=path)

    def test_snakemake(self, finished: Path) -> None:
        (finished / settings.CACHE).unlink(missing_ok=True)
        self.plan(finished, self.SNAKEMAKE, blocked=False)
        assert (finished / settings.CACHE).exists()
        self.plan(finished, self.SNAKEMAKE, blocked=True)

    def test_dvc(self, finished: Path) -> None:
        (finished / settings.CACHE).unlink(missing_ok=True)
        assert "up to date" in self.plan(finished, self.DVC, blocked=False)
        assert "up to date" in self.plan(finished, self.DVC, blocked=True)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Work in an empty folder, and start as a new process does."""
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()

    def restart() -> None:
        settings._known.cache_clear()
        closure._known.cache_clear()
        closure._source.cache_clear()
        closure.digest.cache_clear()

    restart()
    return restart


class TestSettings:
    def params(self, **method: object) -> Path:
        raw = small_params()
        raw["classifiers"] = {"base": {"method": {"edam": method}}}
        Path("p.yaml").write_text(yaml.safe_dump(raw))
        return Path("p.yaml")

    def test_faults_are_never_cached(self, fresh_cache: Callable[[], None]) -> None:
        for _ in range(2):
            with pytest.raises(parameters.PipelineError, match=r"classifiers\.base\.method\.edam\.group: -1 must be"):
                settings.load([self.params(group=-1)])
            fresh_cache()

    def test_cached_parameters_equal_those_of_the_settings(self, fresh_cache: Callable[[], None]) -> None:
        files = [project.ROOT / "params.yaml"]
        blocks = Graph(parameters.load(files)).jobs
        expected = [plain(job.values) for job in blocks]
        settings.load(files)
        fresh_cache()
        assert [settings.as_json(job.values) for job in Graph(parameters.load(files)).jobs] == expected

    def test_an_edit_of_the_implementation_reads_its_settings_again(
        self, fresh_cache: Callable[[], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        params = settings.load([self.params()])
        key = settings._key(params.classifiers["base"])
        assert key in settings._known()
        monkeypatch.setattr(closure, "digest", lambda roots: "another")
        assert settings._key(params.classifiers["base"]) != key

    @pytest.mark.parametrize("content", ["", "damaged", "0\n{}", "[]"])
    def test_a_damaged_cache_is_replaced(self, fresh_cache: Callable[[], None], content: str) -> None:
        for path in (settings.CACHE, closure.CACHE):
            path.write_text(content)
        settings.load([self.params()])
        fresh_cache()
        assert settings._known()
        assert closure._known()


class TestOptimizers:
    @pytest.mark.parametrize(
        ("ours", "torchs", "options"),
        [
            (optimizers.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
            (optimizers.Adam, torch.optim.Adam, {"lr": 0.01}),
        ],
    )
    def test_bytes_equal_those_of_torch(self, ours: type, torchs: type, options: dict[str, object]) -> None:
        weights = []
        for kind in (ours, torchs):
            torch.manual_seed(0)
            network = nn.Linear(7, 3)
            optimizer = kind([{"params": [each], "weight_decay": 0.01} for each in network.parameters()], **options)
            for _ in range(4):
                network(torch.randn(5, 7)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            saved = optimizer.state_dict()
            optimizer = kind([{"params": [each], "weight_decay": 0.01} for each in network.parameters()], **options)
            optimizer.load_state_dict(saved)
            network(torch.randn(5, 7)).square().sum().backward()
            optimizer.step()
            weights.append(torch.cat([each.detach().flatten() for each in network.parameters()]))
        assert torch.equal(weights[0], weights[1])
        assert not weights[0].isnan().any()
