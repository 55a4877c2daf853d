"""The job graph of a set of parameters.

A job is a stage of ``pipeline.config.stage_table`` that runs on one block, with one seed. Which jobs are up to date is
decided in ``pipeline.workflow.freshness``.
"""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, cast

from pipeline.config import references
from pipeline.config.dataset import PREPARATION_STAGES
from pipeline.config.registry import plain
from pipeline.config.schema import Params, backbones
from pipeline.config.stage_table import EXTERNAL, FOLDERS, REPORTED, SECTIONS, STAGES, SUMMARISED, Stage
from pipeline.config.tables import PlannedTable
from pipeline.errors import PipelineError, exit_on_faults, warn
from pipeline.stores import manifest
from pipeline.stores.hashes import fingerprint
from pipeline.workflow import closure, settings

PICTURES = "report_files"  # the folder beside report.html


class Part(NamedTuple):
    """What a stage reads of an input folder: files, and folders with the number of levels of folders."""

    paths: tuple[Path, ...]
    depth: int


@dataclass(frozen=True, eq=False)
class Job:
    """One run of a stage: the files that it reads and writes, its parameters and its code."""

    stage: str
    name: str  # of the block or of the target job; '' if the stage runs once
    inputs: dict[str, Path]
    outputs: dict[str, Path]
    values: Mapping[str, Any]  # all parameters that the outputs depend on; some are dataclasses
    block: Any = None  # the settings, an instance of the schema's dataclass
    manifest_folder: Path | None = None  # only for a dataset
    section: str = ""  # section of the block
    used_blocks: tuple[Any, ...] = ()  # other blocks whose implementations run, such as those of networks that it loads
    parts: Mapping[str, "Part"] = field(default_factory=dict)  # input -> what is read of it, if not all of it
    leaves: tuple[Path, ...] = ()  # outputs that no job reads, and a dataset that only this job writes to
    writers: Mapping[str, "Job"] = field(default_factory=dict)  # input -> the job that writes it
    prefix: str = ""  # 'seed_N/' if N is a further seed (``seeds`` of params.yaml)

    @property
    def full_name(self) -> str:
        """The name that tells the job from all others of its stage."""
        return f"{self.prefix}{self.name}"

    @property
    def label(self) -> str:
        return f"{self.stage} {self.full_name}".strip()

    @property
    def folder(self) -> Path:
        """Folder of the manifest: next to the outputs, but among the results for a dataset, not among its images."""
        return self.manifest_folder or next(iter(self.outputs.values())).parent

    @property
    def files(self) -> list[Path]:
        """The outputs that are files, and the manifest: not a dataset's folder or that of the report's pictures."""
        files = (path for key, path in self.outputs.items() if key != "pictures")
        return [*(() if self.manifest_folder else files), self.folder / manifest.NAME]

    @cached_property
    def params(self) -> dict[str, Any]:
        """The parameters as JSON types. This imports the block's choices unless their settings are cached.

        Raises:
            PipelineError: the settings have faults; it has one line for each.
        """
        return cast(dict[str, Any], settings.as_json(self.values))

    @property
    def precision(self) -> str:
        """The precision of the network that the job loads: the one in which it was trained."""
        return str(self.used_blocks[0].training.precision)

    @property
    def processes(self) -> int:
        """The number of processes of a training, or of the inference with a network: that of its training."""
        blocks = (self.block, *self.used_blocks) if STAGES[self.stage].gpu else ()
        return next((int(block.training.processes) for block in blocks if hasattr(block, "training")), 1)

    @property
    def source_files(self) -> tuple[Path, ...]:
        """The files of the stage and of the implementations that its blocks name.

        Together with their imports, they are all of the project's code that the job runs.
        """
        named = {
            file
            for block in (self.block if self.section else None, *self.used_blocks)
            for file in settings.implementation_files(block)
        }
        return (closure.ROOT / "stages" / f"{self.stage}.py", *sorted(named))

    @property
    def code(self) -> str:
        """SHA-256 of the code that runs, in hexadecimal."""
        return closure.digest(self.source_files)

    def fingerprint(self, name: str) -> str:
        """Return the hash of an input by content.

        Raises:
            OSError: it is a file that cannot be read.
        """
        if name in self.parts:
            return fingerprint(*self.parts[name].paths, depth=self.parts[name].depth)
        return fingerprint(self.inputs[name])

    def key(self, output: Path) -> str:
        """Return the key of an output in the manifest: its file name, or ./PATH if it is in another folder."""
        return output.name if output.parent == self.folder else f"./{output.as_posix()}"


class Graph:
    """All jobs of a set of parameters, in topological order.

    The jobs on blocks follow one another by seed. The outputs of a further seed lie in a folder of its own. All seeds
    share the jobs that run once, which do not depend on a seed, and the report.

    Args:
        prefix: 'seed_N/' for the graph of a further seed, whose jobs another graph takes over.
    """

    def __init__(self, params: Params, prefix: str = "") -> None:
        self.params, self.prefix = params, prefix
        self.results = Path("results") / params.experiment
        self.jobs: list[Job] = []
        self.jobs.extend(self._single())
        self.jobs.extend(self._block(reference) for reference in references.topological_order(params))
        for stage in STAGES.values():
            if stage.targets and not (prefix and stage.first_seed_only):
                self.jobs.extend(self._target_jobs(stage))
        for seed in params.further_seeds:
            further = Graph(replace(params, seed=seed, seeds=None, first=(), tables={}), f"seed_{seed}/")
            self.jobs.extend(job for job in further.jobs if job.prefix)
        self.jobs.extend(self._tables() if params.tables else [self._report()])
        read = {path for job in self.jobs for path in job.inputs.values()}
        self._writers: dict[str, Job] = {}
        for number, job in enumerate(self.jobs):
            writers = {name: writer for name, path in job.inputs.items() if (writer := self.writer(path))}
            job = self.jobs[number] = replace(job, leaves=_leaves(job, read), writers=writers)
            self._writers |= {os.path.abspath(path): job for path in job.outputs.values()}
        if params.tables:
            self.jobs = self._needed_by("table")
        self.first: list[Job] = []  # the jobs of the rows to run first; they come first in ``jobs``
        if (first := references.first_rows(params)) is not None:
            self._begin_with(Graph(first))

    def writer(self, path: Path) -> Job | None:
        """Return the job that writes a file, or the dataset that the file lies in; None if the user supplies it."""
        whole = Path(os.path.abspath(path))
        return next((self._writers[str(each)] for each in (whole, *whole.parents) if str(each) in self._writers), None)

    def _needed_by(self, stage: str) -> list[Job]:
        """Return the jobs of a stage and all jobs that they depend on, in topological order."""
        needed: set[Job] = set()
        waiting = [job for job in self.jobs if job.stage == stage]
        while waiting:
            job = waiting.pop()
            if job not in needed:
                needed.add(job)
                waiting.extend(job.writers.values())
        return [job for job in self.jobs if job in needed]

    def _begin_with(self, graph: "Graph") -> None:
        """Move the jobs of ``graph`` to the front, followed by the report on its rows."""
        *names, _ = ((job.stage, job.full_name) for job in graph.jobs)
        stage, report = STAGES["first_report"], graph.jobs[-1]
        outputs = {key: self.results / stage.folder / report.outputs[key].name for key in ("report", "table")}
        preview = replace(report, stage=stage.name, outputs=outputs, leaves=tuple(outputs.values()))
        self.first = [*(self.find(*name) for name in names), preview]
        self.jobs = [*self.first, *(job for job in self.jobs if job not in self.first)]

    def missing(self) -> list[str]:
        """Return a line for each input that neither exists nor is written by a job, naming its first reader."""
        lines: dict[Path, str] = {}
        for job in self.jobs:
            for path, line in missing(job).items():
                if not self.writer(path):
                    lines.setdefault(path, line)
        return list(lines.values())

    def find(self, stage: str, name: str = "") -> Job:
        """Return the job of a stage by its full name.

        Raises:
            PipelineError: there is no such job; it lists the names that exist.
        """
        named = [job for job in self.jobs if job.stage == stage]
        for job in named:
            if job.full_name == name:
                return job
        choices = ", ".join(job.full_name for job in named) or "nothing: params.yaml has no block for it"
        raise PipelineError(f"{stage} {name}: no such block; {stage} can run {choices}")

    def _single(self) -> Iterator[Job]:
        """Yield the jobs that run once and whose outputs other jobs read."""
        dataset, saliency = self.params.dataset, self.params.saliency
        for name in dataset.preparation_stages[:1]:
            stage, block = STAGES[name], getattr(dataset, name)
            values = {"block": block} if stage.settings else {}
            inputs, root = self._user_inputs(stage), {"root": Path(dataset.root)}
            parts = {
                key: Part(tuple(path / part for part in EXTERNAL[key].parts), EXTERNAL[key].depth)
                for key, path in inputs.items()
            }
            yield Job(name, "", inputs, root, values, block, self.results / stage.folder, parts=parts)
        kept = {key: value for key, value in plain(dataset).items() if key not in PREPARATION_STAGES}
        folder = saliency.path if saliency.kind == "folder" else None
        classes = None if dataset.classes == "voc" else dataset.classes
        names = (dataset.train, dataset.evaluation, dataset.tags, dataset.images, dataset.masks, dataset.boxes, classes)
        job = self._job(STAGES["index"])
        parts = {name: Part((path,), 2 if name == "extra" else sys.maxsize) for name, path in job.inputs.items()}
        parts["root"] = Part(tuple(Path(dataset.root) / name for name in names if name), sys.maxsize)
        yield replace(job, values={"dataset": kept, "saliency": folder}, block=dataset, parts=parts)
        yield self._job(STAGES["ground_truth"])
        yield self._job(STAGES["saliency"], block=saliency)

    def _block(self, reference: str) -> Job:
        """Return the job of a block."""
        section, name = reference.split("/")
        stage, block = FOLDERS[section], self._settings(reference)
        reads = stage.reads.items()
        files = {key: self._source(getattr(block, read.key)) / read.file for key, read in reads if read.key}
        models = tuple(self._settings(getattr(block, read.key)) for key, read in reads if key == "model")
        weights = weight_files(block) if stage.trains else {}
        return self._job(stage, name, files | weights, block, section, models)

    def _source(self, reference: str) -> Path:
        """Return the folder of the job that a block refers to: a block with the same seed, or a job that runs once."""
        return self.results / (reference if reference in STAGES else f"{self.prefix}{reference}")

    def _target_jobs(self, stage: Stage) -> Iterator[Job]:
        """Yield a job for each target of the stage."""
        rows = references.rows(self.params)
        block = getattr(self.params, stage.settings) if stage.settings else None
        for folder in stage.targets:
            section_jobs = {name: f"{folder}/{name}" for name in getattr(self.params, folder, ())}
            for name, source in (section_jobs if folder in SECTIONS else rows).items():
                files = {stem: FOLDERS[folder].output(stem) for stem in stage.target_files}
                inputs = {stem: self._source(f"{folder}/{name}") / file for stem, file in files.items() if file}
                models = (self._settings(source),) if "model" in inputs else ()
                job_name = f"{folder}/{name}" if stage.qualified_names else name
                yield self._job(stage, job_name, inputs, block, source.split("/")[0], models)

    def _tables(self) -> Iterator[Job]:
        """Yield the job of each of the papers' tables, which reads the scores of its rows and the logs of trainings."""
        for name, table in self.params.tables.items():
            assert isinstance(table, PlannedTable)
            ends = {reference for chain in table.chains.values() for reference in chain.values()}
            prefixes = sorted({job.prefix for job in self.jobs})
            inputs = {
                f"scores of {prefix}{end}": self.results / prefix / "evaluation" / end / "scores.json"
                for prefix in prefixes
                for end in sorted(ends)
            }
            conditions = {key: attrgetter(key)(self.params) for key in ("test", "saliency", "dataset.root")}
            conditions["seeds"] = self.params.every_seed
            job = self._job(STAGES["table"], name, inputs)
            yield replace(job, values={**conditions, "table": table}, block=self.params)

    def _report(self) -> Job:
        """Return the job of the report, which reads outputs of all other jobs.

        A store is keyed by its reference, doubt maps and JSON files by 'KEY of REFERENCE'. Of a further seed, it reads
        scores and logs, whose references start with the prefix. Where no stage creates the dataset, it may be the
        user's own photos, and the report has a folder with pictures of all of them.
        """
        inputs: dict[str, Path] = {}
        named = {read.job for read in STAGES["report"].reads.values()}
        for job in self.jobs:
            if job.stage in named:
                continue
            reference = (
                job.name if STAGES[job.stage].qualified_names else f"{STAGES[job.stage].folder}/{job.name}".rstrip("/")
            )
            for key in SUMMARISED if job.prefix else REPORTED:
                if path := job.outputs.get(key):
                    is_store = path.suffix == ".h5" and key != "doubt"
                    inputs[reference if is_store else f"{key} of {job.prefix}{reference}"] = path
        values: dict[str, Any] = {key: getattr(self.params, key) for key in ("method", "gallery")}
        values |= {"seeds": self.params.every_seed, "rows": references.chains(self.params)}
        outputs = {
            "report": self.results / "report.html",
            "table": self.results / "metrics.json",
            "metrics": Path("metrics.json"),
        }
        if not self.params.dataset.preparation_stages and values["rows"]:
            outputs["pictures"] = self.results / PICTURES
        job = self._job(STAGES["report"], "", inputs)
        rules = tuple(self.params.pseudo_labels.values())  # the report prints their descriptions
        return replace(job, outputs=outputs, values=values, block=self.params, used_blocks=rules)

    def _job(
        self,
        stage: Stage,
        name: str = "",
        inputs: Mapping[str, Path] | None = None,
        block: Any = None,
        section: str = "",
        models: tuple[Any, ...] = (),
    ) -> Job:
        """Build a job. ``inputs`` are its inputs except outputs of jobs that run once and user-supplied files."""
        values = {key: attrgetter(key)(self.params) for key in stage.params}
        values |= {} if block is None else {"block": block}
        more = dict(inputs or {})
        read = {key: self.results / x.job / x.file if x.job else more.pop(key) for key, x in stage.reads.items()}
        prefix = self.prefix if stage.has_many_jobs else ""
        folder = self.results / prefix / stage.folder / name
        outputs = {Path(file).stem: folder / file for file in stage.writes}
        inputs = self._user_inputs(stage) | read | more
        return Job(stage.name, name, inputs, outputs, values, block, None, section, models, prefix=prefix)

    def _settings(self, reference: str) -> Any:
        section, name = reference.split("/")
        return getattr(self.params, section)[name]

    def _user_inputs(self, stage: Stage) -> dict[str, Path]:
        """Return the user-supplied inputs of a stage."""
        paths: dict[str, Path] = {}
        for name in stage.external:
            section, key = EXTERNAL[name].key.split(".")
            path = getattr(getattr(self.params, section), key)
            if path and EXTERNAL[name].saliency_kind in ("", self.params.saliency.kind):
                paths[name] = Path(path)
        return paths


def weight_files(block: Any) -> dict[str, Path]:
    """Return the files with initial weights of the backbones of a block."""
    weights = {key: value.weights for key, value in backbones(block).items() if value.weights not in (None, "imagenet")}
    return {f"weights of {key}": Path(file) for key, file in weights.items() if file is not None}


def _leaves(job: Job, read: set[Path]) -> tuple[Path, ...]:
    """Return the outputs whose content ``is_fresh`` compares: no reader would notice that they are damaged.

    The generated demo is one too, since the index would take a damaged image for a new one. A dataset that may hold
    files of the user is not: the index reports what is missing there.
    """
    if job.manifest_folder:
        return () if STAGES[job.stage].keeps_user_files else tuple(job.outputs.values())
    return tuple(path for path in job.outputs.values() if path not in read)


def missing(job: Job) -> dict[Path, str]:
    """Return the inputs of a job that do not exist or cannot be accessed, each with a message."""
    lines: dict[Path, str] = {}
    for name, path in job.inputs.items():
        try:
            os.stat(path)
        except OSError as error:
            if name.startswith("weights of "):
                key = name.removeprefix("weights of ")
                library = "timm" if backbones(job.block)[key].name.startswith("timm:") else "torchvision"
                choices = f"'imagenet' downloads {library}'s, if any, null starts at random"
                fix = f"put the file there, or correct {key}.weights: {choices}"
            else:
                fix = EXTERNAL[name].fix if name in EXTERNAL else "run the stage that writes it"
            fault = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
            lines[path] = f"{path}: {fault} ({name} of {job.label}); {fix}"
    return lines


def main() -> None:
    """Print the commands of all jobs in order; ``python -m pipeline.workflow.graph [FILE ...] | sh -e`` runs them.

    If the params are invalid, print only ``exit 1``, so that the shell fails too.
    """
    files = sys.argv[1:] or ["params.yaml"]
    with exit_on_faults():
        try:
            graph = Graph(settings.load([Path(name) for name in files], notice=warn))
        except PipelineError:
            print("exit 1")
            raise
        for job in graph.jobs:
            name = filter(None, [job.full_name])
            print(shlex.join(["python", "-m", f"stages.{job.stage}", *name, "--params", *files]))


if __name__ == "__main__":
    main()
