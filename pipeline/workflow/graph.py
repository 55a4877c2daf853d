"""The jobs of a set of parameters: which files each reads and writes, its exact parameters and its code.

A job is a stage of ``pipeline.config.stage_table`` applied to one block. The manifest beside its outputs, which names
the inputs, parameters and code that they come from, decides whether the job is up to date.
"""

import dataclasses
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from pipeline.config import params as parameters
from pipeline.config import references
from pipeline.config.registry import BACKBONES, Choice, plain
from pipeline.config.schema import MAKERS, Backbone, Params, backbones
from pipeline.config.stage_table import EXTERNAL, FOLDERS, REPORTED, SECTIONS, STAGES, Stage
from pipeline.errors import PipelineError
from pipeline.stores import manifest
from pipeline.stores.files import fingerprint
from pipeline.workflow import closure


@dataclass(frozen=True, eq=False)
class Job:
    """One run of a stage."""

    stage: str
    name: str  # of the block, or the reference of the job that it is about; '' where the stage runs once
    inputs: dict[str, Path]
    outputs: dict[str, Path]
    values: Mapping[str, Any]  # all parameters that the outputs depend on, some as dataclasses
    block: Any = None  # the settings, as their dataclass
    home: Path | None = None
    section: str = ""  # of the block
    others: tuple[Any, ...] = ()  # further blocks whose implementations it uses: those of the networks that it loads

    @property
    def label(self) -> str:
        return f"{self.stage} {self.name}".strip()

    @property
    def folder(self) -> Path:
        """Where the manifest lies: beside the outputs; a dataset's lies with the results, not among its images."""
        return self.home or next(iter(self.outputs.values())).parent

    @cached_property
    def params(self) -> dict[str, Any]:
        """The parameters as JSON holds them. This reads the settings of the block's choices, and thus imports them.

        Raises:
            PipelineError: with every fault of the settings, a line each.
        """
        return cast(dict[str, Any], plain(self.values))

    @property
    def programs(self) -> tuple[Path, ...]:
        """The stage's file, and those of the implementations that its block, or a network that it loads, names.

        With what they import they are all of the project's code that runs.
        """
        named = {file for block in (self.block if self.section else None, *self.others) for file in _chosen(block)}
        return (closure.ROOT / "stages" / f"{self.stage}.py", *sorted(named))

    @property
    def code(self) -> str:
        """sha256 of the code that runs."""
        return closure.digest(self.programs)

    def key(self, output: Path) -> str:
        """What the manifest calls an output: its name, or ./PATH where it does not lie beside the manifest."""
        return output.name if output.parent == self.folder else f"./{output.as_posix()}"


class Graph:
    """All jobs of a set of parameters, in an order in which they can run."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.results = Path("results") / params.experiment
        self.jobs: list[Job] = []
        self.jobs.extend(self._single())
        self.jobs.extend(self._block(reference) for reference in references.in_order(params))
        for stage in STAGES.values():
            if stage.about:
                self.jobs.extend(self._about(stage))
        self.jobs.append(self._report())

    def missing(self) -> list[str]:
        """A line for each file that no job writes and that does not exist, by the first job that reads it."""
        written: set[Path] = set()
        lines: dict[Path, str] = {}
        for job in self.jobs:
            lines |= {path: line for path, line in missing(job).items() if path not in written and path not in lines}
            written.update(job.outputs.values())
        return list(lines.values())

    def find(self, stage: str, name: str = "") -> Job:
        """Raises PipelineError naming the blocks that there are."""
        named = [job for job in self.jobs if job.stage == stage]
        for job in named:
            if job.name == name:
                return job
        choices = ", ".join(job.name for job in named) or "nothing: params.yaml has no such block"
        raise PipelineError(f"{stage} {name}: no such block; {stage} can run {choices}")

    def _single(self) -> Iterator[Job]:
        """The jobs that run once and that others read."""
        dataset, saliency = self.params.dataset, self.params.saliency
        for maker in dataset.makers[:1]:
            stage, block = STAGES[maker], getattr(dataset, maker)
            values = {"block": block} if stage.settings else {}
            yield Job(maker, "", self._external(stage), {"root": Path(dataset.root)}, values, block, self._dataset)
        kept = {key: value for key, value in plain(dataset).items() if key not in MAKERS}
        folder = saliency.path if saliency.kind == "folder" else None
        yield replace(self._job(STAGES["index"]), values={"dataset": kept, "saliency": folder}, block=dataset)
        yield self._job(STAGES["ground_truth"])
        yield self._job(STAGES["saliency"], block=saliency)

    @property
    def _dataset(self) -> Path:
        return self.results / "dataset"

    def _block(self, reference: str) -> Job:
        """The job whose settings are a block."""
        section, name = reference.split("/")
        stage, block = FOLDERS[section], self._settings(reference)
        reads = stage.reads.items()
        files = {key: self.results / getattr(block, read.key) / read.file for key, read in reads if read.key}
        models = tuple(self._settings(getattr(block, read.key)) for key, read in reads if key == "model")
        weights = weight_files(block) if stage.trains else {}
        return self._job(stage, name, files | weights, block, section, models)

    def _about(self, stage: Stage) -> Iterator[Job]:
        """A job for each of the jobs that the stage is about."""
        rows = references.rows(self.params)
        block = getattr(self.params, stage.settings) if stage.settings else None
        for folder in stage.about:
            of_section = {name: f"{folder}/{name}" for name in getattr(self.params, folder, ())}
            for name, source in (of_section if folder in SECTIONS else rows).items():
                files = {stem: FOLDERS[folder].output(stem) for stem in stage.own}
                inputs = {stem: self.results / folder / name / file for stem, file in files.items() if file}
                models = (self._settings(source),) if "model" in inputs else ()
                called = f"{folder}/{name}" if stage.full_names else name
                yield self._job(stage, called, inputs, block, source.split("/")[0], models)

    def _report(self) -> Job:
        """Reads what all other jobs write for it: stores by their reference, JSON files as KEY of REFERENCE."""
        inputs: dict[str, Path] = {}
        for job in self.jobs:
            reference = (
                job.name if STAGES[job.stage].full_names else f"{STAGES[job.stage].folder}/{job.name}".rstrip("/")
            )
            for key in REPORTED:
                if path := job.outputs.get(key):
                    inputs[reference if path.suffix == ".h5" else f"{key} of {reference}"] = path
        values = {"method": self.params.method, "gallery": self.params.gallery, "rows": self._chains()}
        outputs = {
            "report": self.results / "report.html",
            "table": self.results / "metrics.json",
            "metrics": Path("metrics.json"),
        }
        job = self._job(STAGES["report"], "", inputs)
        rules = tuple(self.params.pseudo_labels.values())  # they describe themselves in the report
        return replace(job, outputs=outputs, values=values, block=self.params, others=rules)

    def _chains(self) -> dict[str, dict[str, str]]:
        """For each row the references that its numbers come from: maps, labels, predictions."""
        chains: dict[str, dict[str, str]] = {}
        for name in references.rows(self.params):
            chains[name] = {"predictions": f"predictions/{name}"}
            if name in self.params.segmentations:
                labels = chains[name]["labels"] = self.params.segmentations[name].labels
                if rule := references.label_rule(self.params, labels):
                    chains[name]["maps"] = rule.source
        return chains

    def _job(
        self,
        stage: Stage,
        name: str = "",
        inputs: Mapping[str, Path] | None = None,
        block: Any = None,
        section: str = "",
        models: tuple[Any, ...] = (),
    ) -> Job:
        """``inputs``: beside those of jobs that run once, and those that the user supplies."""
        values = {key: getattr(self.params, key) for key in stage.params} | ({} if block is None else {"block": block})

        more = dict(inputs or {})
        read = {key: self.results / x.job / x.file if x.job else more.pop(key) for key, x in stage.reads.items()}
        folder = self.results / stage.folder / name
        outputs = {Path(file).stem: folder / file for file in stage.writes}
        return Job(stage.name, name, self._external(stage) | read | more, outputs, values, block, None, section, models)

    def _settings(self, reference: str) -> Any:
        section, name = reference.split("/")
        return getattr(self.params, section)[name]

    def _external(self, stage: Stage) -> dict[str, Path]:
        """The files and folders among the stage's inputs that the user supplies."""
        found: dict[str, Path] = {}
        for name in stage.external:
            section, key = EXTERNAL[name].key.split(".")
            path = getattr(getattr(self.params, section), key)
            if path and (name != "store" or self.params.saliency.kind == "store"):
                found[name] = Path(path)
        return found


def weight_files(block: Any) -> dict[str, Path]:
    """The files that a trained block's backbones start from."""
    named = {key: value.weights for key, value in backbones(block).items() if value.weights not in (None, "imagenet")}
    return {f"weights of {key}": Path(file) for key, file in named.items() if file is not None}


def _chosen(value: Any) -> Iterator[Path]:
    """The files of the implementations that a block names: its method, backbone, rule or network."""
    if isinstance(value, Choice | Backbone):
        registry = value.registry if isinstance(value, Choice) else BACKBONES
        if (file := registry.file(value.name)) is not None:
            yield file
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _chosen(item)
    elif dataclasses.is_dataclass(value):
        yield from _chosen(vars(value))


def missing(job: Job) -> dict[Path, str]:
    """The job's inputs that do not exist, and a line on each."""
    lines: dict[Path, str] = {}
    for name, path in job.inputs.items():
        if not path.exists():
            if name.startswith("weights of "):
                fix = "put the file there"
            else:
                fix = EXTERNAL[name].fix if name in EXTERNAL else "run the stage that makes it"
            lines[path] = f"{path}: missing ({name} of {job.label}); {fix}"
    return lines


def is_fresh(job: Job, hashes: dict[Path, str]) -> bool:
    """Whether the job's outputs exist and its manifest names these inputs, parameters and code.

    ``hashes`` keeps what was already looked up: of a job's output what its manifest says, of any other file its bytes.
    """
    found = manifest.read(job.folder)
    if found is None or found.get("stage") != job.label or not all(path.exists() for path in job.outputs.values()):
        return False
    if found["code"] != job.code or found["params"] != job.params:
        return False
    shared = [path for path in job.outputs.values() if path.parent != job.folder and path.is_file()]
    if any(found["outputs"].get(job.key(path)) != fingerprint(path) for path in shared):
        return False  # as metrics.json, which each experiment writes
    for key, path in job.inputs.items():
        if path not in hashes:
            if not path.exists():
                return False
            beside = manifest.read(path.parent)
            made = beside.get("outputs", {}).get(path.name) if beside else None
            hashes[path] = made or fingerprint(path)
        if found["inputs"].get(key) != hashes[path]:
            return False
    return True


def stale(graph: Graph) -> list[Job]:
    """Jobs whose outputs are missing or do not fit, and all jobs that follow from them, in order."""
    out: list[Job] = []
    remade: set[Path] = set()
    hashes: dict[Path, str] = {}
    for job in graph.jobs:
        if remade.intersection(job.inputs.values()) or not is_fresh(job, hashes):
            out.append(job)
            remade.update(job.outputs.values())
    return out


def main() -> None:
    """Print the command of every job in order: ``python -m pipeline.workflow.graph [FILE ...] | sh -e`` runs them.

    If the params are wrong, the only command printed is one that fails, so that the shell fails too.
    """
    files = sys.argv[1:] or ["params.yaml"]
    try:
        graph = Graph(parameters.load([Path(name) for name in files], resolve=True))
    except PipelineError as error:
        print("exit 1")
        sys.exit("\n".join(f"error: {line}" for line in error.lines))
    for job in graph.jobs:
        print(shlex.join(["python", "-m", f"stages.{job.stage}", *filter(None, [job.name]), "--params", *files]))


if __name__ == "__main__":
    main()
