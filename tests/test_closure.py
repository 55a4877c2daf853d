"""Which code a job depends on: all that runs, and no more; what changes its hash, and what does not."""

import json
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.params import load
from pipeline.workflow import closure
from pipeline.workflow.graph import Graph, Job
from tests import project
from tests.faults import TABLES

CACHES = (closure.digest, closure._data, closure._imports, closure._source, closure._known)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Writes files of a small project, by their paths."""
    monkeypatch.setattr(closure, "ROOT", tmp_path)

    def write(**files: str) -> None:
        for cache in CACHES:
            cache.cache_clear()
        for name, text in files.items():
            path = tmp_path / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))

    yield write
    for cache in CACHES:
        cache.cache_clear()


def names(root: str) -> set[str]:
    """The closure of a file, relative to the project."""
    return {file.relative_to(closure.ROOT).as_posix() for file in closure.files([closure.ROOT / root])}


def digest(text: str, tree: Callable[..., None]) -> str:
    tree(stages__one=text)
    return closure.digest((closure.ROOT / "stages/one.py",))


class TestFiles:
    def test_what_is_imported_in_any_form(self, tree: Callable[..., None]) -> None:
        tree(
            stages__one="import pipeline.a.b\nfrom pipeline import c\nfrom pipeline.a.d import name\nimport numpy\n",
            pipeline__a__b="def f():\n    from pipeline import late\n",
            pipeline__c="from . import e\nfrom .a import g\nif x:\n    import pipeline.h as other\n",
            pipeline__a__d="name = 1\n",
            **{f"pipeline__{name}": "" for name in ("late", "e", "a__g", "h", "unused")},
        )
        expected = ("late", "e", "h", "c", "a/b", "a/d", "a/g")
        assert names("stages/one.py") == {"stages/one.py", *(f"pipeline/{name}.py" for name in expected)}

    def test_what_only_a_type_checker_imports_is_left_out(self, tree: Callable[..., None]) -> None:
        tree(
            stages__one="""
                import typing
                from typing import TYPE_CHECKING
                if TYPE_CHECKING:
                    from pipeline import a
                else:
                    from pipeline import b
                if typing.TYPE_CHECKING:
                    from pipeline import c
                """,
            pipeline__a="",
            pipeline__b="",
            pipeline__c="",
        )
        assert names("stages/one.py") == {"stages/one.py", "pipeline/b.py"}

    def test_packages_around_a_module_run_first(self, tree: Callable[..., None]) -> None:
        tree(stages__one="from pipeline.a.b import name\n", stages____init__="", pipeline__a__b="name = 1\n")
        for package in ("pipeline", "pipeline/a"):
            (closure.ROOT / package / "__init__.py").write_text("")
        (closure.ROOT / "pipeline/a/__init__.py").write_text("from pipeline import c\n")
        (closure.ROOT / "pipeline/c.py").write_text("")
        (closure.ROOT / "stages/__init__.py").write_text("")
        inits = {"stages/__init__.py", "pipeline/__init__.py", "pipeline/a/__init__.py"}
        assert names("stages/one.py") == {"stages/one.py", "pipeline/a/b.py", "pipeline/c.py", *inits}

    def test_a_circle_of_imports_ends(self, tree: Callable[..., None]) -> None:
        tree(stages__one="import pipeline.a\n", pipeline__a="import pipeline.b\n", pipeline__b="import pipeline.a\n")
        assert names("stages/one.py") == {"stages/one.py", "pipeline/a.py", "pipeline/b.py"}

    def test_templates_belong_to_the_modules_of_their_folder(self, tree: Callable[..., None]) -> None:
        tree(stages__one="import pipeline.report.page\n", pipeline__report__page="", pipeline__other="")
        folder = closure.ROOT / "pipeline/report/templates"
        folder.mkdir()
        for name in ("page.html.j2", "notes.md"):
            (folder / name).write_text("one")
        assert names("stages/one.py") - {"stages/one.py", "pipeline/report/page.py"} == {
            "pipeline/report/templates/page.html.j2"
        }
        assert names("pipeline/other.py") == {"pipeline/other.py"}
        before = closure.digest((closure.ROOT / "stages/one.py",))
        (folder / "page.html.j2").write_text("two")
        tree()
        assert closure.digest((closure.ROOT / "stages/one.py",)) != before


SOURCE = '''
"""Module."""
import os  # a comment


class A:
    """Class."""

    x: int = 1
    "What x is."

    def f(self, y=None):
        """Method."""
        return {**y, "b": self.x}
'''


@pytest.mark.parametrize(
    "other",
    [
        SOURCE.replace("# a comment", "# another"),
        SOURCE.replace('"""Module."""', '"""Another."""'),
        SOURCE.replace('"""Class."""', ""),
        SOURCE.replace('        """Method."""\n', '        """Method,\n        at length."""\n'),
        SOURCE.replace("What x is", "What x means"),
        SOURCE.replace('{**y, "b": self.x}', "{\n            **y,\n            'b': (self.x),\n        }"),
    ],
)
def test_text_that_does_not_run_changes_nothing(other: str, tree: Callable[..., None]) -> None:
    assert other != SOURCE
    assert digest(other, tree) == digest(SOURCE, tree)


@pytest.mark.parametrize(
    "other",
    [
        SOURCE.replace("= 1", "= 2"),
        SOURCE.replace("= 1", "= True"),
        SOURCE.replace("= 1", "= 1.0"),
        SOURCE.replace("y=None", "y"),
        SOURCE.replace('{**y, "b": self.x}', '{"b": y, **self.x}'),
        SOURCE.replace("import os", "import os as so"),
        SOURCE.replace("def f", "async def f"),
        SOURCE.replace("x: int = 1", "y: int = 1"),
    ],
)
def test_text_that_runs_changes_the_hash(other: str, tree: Callable[..., None]) -> None:
    assert other != SOURCE
    assert digest(other, tree) != digest(SOURCE, tree)


def test_a_change_is_seen_in_what_is_imported(tree: Callable[..., None]) -> None:
    tree(pipeline__a="x = 1\n", pipeline__b="x = 1\n")
    before = digest("from pipeline.a import x\n", tree)
    tree(pipeline__b="x = 2\n")
    assert digest("from pipeline.a import x\n", tree) == before
    tree(pipeline__a="x = 2\n")
    assert digest("from pipeline.a import x\n", tree) != before


CODES = """
import json
from pathlib import Path
from pipeline.workflow.graph import Graph
from pipeline.config.params import load
print(json.dumps({job.label: job.code for job in Graph(load([Path("params.yaml")])).jobs}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return project.copy(tmp_path / "project", git=False)


def codes(folder: Path) -> dict[str, str]:
    """The code of all jobs of params.yaml, by their labels."""
    found: dict[str, str] = json.loads(project.run(folder, "python", "-c", CODES))
    return found


def edited(folder: Path, source: str) -> set[str]:
    """The jobs whose code is another after an edit of ``source``; those that follow from them not counted."""
    before = codes(folder)
    with (folder / source).open("a") as file:
        file.write("\nANOTHER = 1\n")
    after = codes(folder)
    return {label for label in before if before[label] != after[label]}


def test_comments_and_docstrings_anywhere_touch_no_job(folder: Path) -> None:
    before, count = codes(folder), 0
    for source in [*(folder / "pipeline").rglob("*.py"), *(folder / "stages").glob("*.py")]:
        text = source.read_text()
        if text:
            assert text.startswith('"""'), source
            source.write_text(f'"""Reworded: {text[3:]}\n# a comment\n')
            count += 1
    assert count > 100
    assert codes(folder) == before


def test_a_store_touches_all_that_read_or_write_one(folder: Path) -> None:
    every = set(codes(folder))
    assert edited(folder, "pipeline/stores/raster.py") == every - {"demo"}  # the index takes the type of a mask from it


def test_a_method_touches_the_networks_that_name_it(folder: Path) -> None:
    kinds = ("classifier", "features", "localization")
    assert edited(folder, "pipeline/methods/edam.py") == {f"{k} {n}" for k in kinds for n in ("edam", "edam_no_cma")}


def test_a_label_rule_and_a_backbone_touch_the_blocks_that_name_them(folder: Path) -> None:
    assert edited(folder, "pipeline/networks/vgg.py") == set()
    assert len(edited(folder, "pipeline/networks/small.py")) > 80
    assert edited(folder, "pipeline/labels/edam.py") == {
        "pseudo_labels edam_saliency",
        "pseudo_labels oaa_edam_rule",
        "first_report",
        "report",
    }


def test_the_download_touches_no_job_of_another_dataset(folder: Path) -> None:
    assert edited(folder, "pipeline/data/download.py") == set()


def test_the_report_touches_no_job_but_the_reports(folder: Path) -> None:
    assert edited(folder, "pipeline/report/page.py") == {"first_report", "report"}


LOADED = """
import json, runpy, sys
from pathlib import Path
stage, *rest = sys.argv[1:]
sys.argv = [stage, *rest]
runpy.run_module(f"stages.{stage}", run_name="__main__", alter_sys=True)
files = [Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)]
root = Path.cwd()
print("LOADED", json.dumps([file.relative_to(root).as_posix() for file in files if file.is_relative_to(root)]))
"""
FEW: dict[str, Any] = {
    "rows": ["drs_refined", "mixed", "agen"],
    "method": "mixed",
    "dataset": {"demo": {"train": 12, "evaluation": 4, "size": 48}},
    "gallery": 2,
    "mixtures": {"half": {"labels": "pseudo_labels/amr_irn", "share": 0.5}},
    "segmentations": {"mixed": {"labels": "mixtures/half"}},
    "boxes": {"cam": {"model": "classifiers/base"}},
    "test": {"crf": {}},
}
SHORT = {"epochs": 1, "milestones": [], "warmup": 0}
FETCHES = ("download", "coco_stuff", "cub")


@pytest.mark.slow
def test_all_that_a_stage_loads_is_in_its_closure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each job in a process of its own; of the stages that fetch a dataset, what their import loads."""
    raw = yaml.safe_load((folder / "params.yaml").read_text())
    sections = ("classifiers", "refinements", "affinities", "segmentations", "one_step")
    short = {section: {"training": SHORT} for section in sections}
    short["classifiers"]["accumulate"] = {"skip_epochs": 0}
    blocks = {name: {"training": SHORT} for name in raw["refinements"]}
    (folder / "few.yaml").write_text(yaml.safe_dump({**FEW, "defaults": short, "refinements": blocks}))
    (folder / "table.yaml").write_text(yaml.safe_dump({"rows": None, "method": "cam", "tables": TABLES}))
    monkeypatch.chdir(folder)
    jobs: dict[str, tuple[Job, list[str]]] = {}  # tables run instead of rows
    for files in (["params.yaml", "few.yaml", "table.yaml"], ["params.yaml", "few.yaml"]):
        jobs = {job.label: (job, files) for job in Graph(load([Path(file) for file in files])).jobs} | jobs
    stages = {job.stage for job, _ in jobs.values()}
    assert stages | set(FETCHES) == {file.stem for file in (folder / "stages").glob("[a-z]*.py")}
    for job, files in jobs.values():
        arguments = [job.stage, *filter(None, [job.name]), "--params", *files, "--threads", "1"]
        text = project.run(folder, "python", "-c", LOADED, *arguments)
        loaded = set(json.loads(text.rpartition("LOADED ")[2]))
        known = {file.relative_to(closure.ROOT).as_posix() for file in closure.files(job.source_files)}
        assert loaded <= known, f"{job.label}: {sorted(loaded - known)}"
        assert len(loaded) > 10
    for stage in FETCHES:
        code = LOADED.replace("runpy.run_module", "(lambda name, **_: __import__(name))")
        text = project.run(folder, "python", "-c", code, stage)
        assert set(json.loads(text.rpartition("LOADED ")[2])) <= names(f"stages/{stage}.py")
