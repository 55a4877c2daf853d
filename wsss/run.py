"""Run a profile to the end: train, report, and write the masks of all its photos."""

import argparse
import importlib.util
import json
import os
import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.reader import did_you_mean
from pipeline.errors import PipelineError
from wsss import export

if TYPE_CHECKING:
    from pipeline.config.schema import Params

EPILOG = "The same command again goes on where a run ended, and does only what is new or changed."
PROFILES = Path("profiles")
BASE = "params.yaml"  # which the profile overrides
WORKFLOW = ("snakemake", "h5py", "pydensecrf", "jinja2")  # modules of the extra
FORMATS = "png,overlay"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the profile: NAME for profiles/NAME.yaml, or a path")
    parser.add_argument("--rows", metavar="LIST", help="comma-separated rows to run; default: those of the profile")
    parser.add_argument("--cores", type=int, default=0, metavar="N", help="processor cores; default: all")
    parser.add_argument("-n", "--dry-run", action="store_true", help="only list the jobs that would run")


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        files: params files in the order in which they are merged.
        overrides: params that the command line sets.
        again: the command to type to go on after an interruption.
    """

    files: list[Path]
    overrides: dict[str, Any]
    params: "Params"
    again: str

    @property
    def results(self) -> Path:
        return Path("results") / self.params.experiment

    @property
    def model(self) -> Path:
        return self.results / "predictions" / self.params.method / export.MODEL


def run(options: argparse.Namespace) -> int:
    """Run the profile and return the exit status: Snakemake's, or 1 if some photos are broken.

    Raises:
        PipelineError: the profile, an option or this installation has faults; it has a line for each.
    """
    require_checkout("run")
    plan = read_plan(options)
    if options.dry_run:
        print(*_outline(plan), sep="\n")
        return 0
    from pipeline.workflow import reproduce

    log = plan.results / "logs" / "run.log"
    cores = options.cores or len(os.sched_getaffinity(0))
    arguments = ["--cores", str(cores), "--configfile", *map(str, plan.files), *_threads(plan.params, cores)]
    if plan.overrides:
        arguments += ["--config", *(f"{key}={json.dumps(value)}" for key, value in plan.overrides.items())]
    status = reproduce.run(arguments, sys.stdout, log, again=f"type: {plan.again}")
    if status:
        return status
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    status = export.run(parser.parse_args([f"{plan.params.experiment}/{plan.params.method}", "--formats", FORMATS]))
    print(*_closing(plan, log), sep="\n")
    return status


def require_checkout(command: str) -> None:
    """Check that the workflow is here and can run.

    Raises:
        PipelineError: this is no checkout of the project, or packages of the extra are missing.
    """
    faults = []
    if not Path("Snakefile").is_file() or not Path(BASE).is_file():
        faults.append(
            f"{Path.cwd()}: has no Snakefile; wsss {command} runs in a clone of the project: cd to it, where profiles/ "
            "and results/ lie as well"
        )
    if absent := [name for name in WORKFLOW if importlib.util.find_spec(name) is None]:
        faults.append(f"{', '.join(absent)}: not installed, but wsss {command} trains; pip install '.[workflow]'")
    if faults:
        raise PipelineError(*faults)


def read_plan(options: argparse.Namespace) -> Plan:
    """Read the profile.

    Raises:
        PipelineError: it does not exist or has faults, or an option is out of range.
    """
    from pipeline.config import references
    from pipeline.config.params import load

    if options.cores < 0:
        raise PipelineError(f"--cores {options.cores}: must be at least 1")
    file = Path(options.name) if options.name.endswith((".yaml", ".yml")) else PROFILES / f"{options.name}.yaml"
    if not file.is_file():
        known = did_you_mean(options.name, sorted(path.stem for path in PROFILES.glob("*.yaml")))
        raise PipelineError(
            f"{file}: no such profile{known}; to write one, type: wsss new PHOTOS TAGS --name {shlex.quote(file.stem)}"
        )
    files = [Path(BASE), file]
    overrides: dict[str, Any] = {}
    if options.rows is not None:
        rows = [name.strip() for name in options.rows.split(",") if name.strip()]
        if not rows:
            raise PipelineError("--rows: names no row; name some of the profile's rows, separated by commas")
        overrides = {"rows": rows}
        if load(files).method not in rows:
            overrides["method"] = rows[0]
    params = load(files, overrides)
    if not references.rows(params):
        line = f"{file}: has no rows, so it trains no network whose masks wsss run could write"
        raise PipelineError(f"{line}; type: snakemake --cores all --configfile {BASE} {file}")
    return Plan(files, overrides, params, shlex.join(["wsss", *options.arguments]))


def _threads(params: "Params", cores: int) -> list[str]:
    """Snakemake's arguments that share the cores among the jobs of a stage. With a GPU the stages have their own."""
    from pipeline import cards
    from pipeline.config.stage_table import STAGES
    from pipeline.workflow.graph import Graph

    if cards.visible():
        return []
    jobs = Counter(job.stage for job in Graph(params).jobs)
    threads = {name: max(1, min(STAGES[name].threads, cores // count)) for name, count in jobs.items()}
    return ["--set-threads", *(f"{name}={count}" for name, count in threads.items())]


def _outline(plan: Plan) -> list[str]:
    """What a run would do. It reads the settings of all blocks, so that their faults are found."""
    from pipeline.workflow import settings
    from pipeline.workflow.freshness import stale
    from pipeline.workflow.graph import Graph

    graph = Graph(settings.load(plan.files, plan.overrides))
    if faults := graph.missing():
        raise PipelineError(*faults)
    jobs = [job.label for job in stale(graph)]
    if not jobs:
        return [f"all {len(graph.jobs)} jobs are up to date"]
    return [f"{len(jobs)} of {len(graph.jobs)} jobs to run:", *(f"  {label}" for label in jobs)]


def _closing(plan: Plan, log: Path) -> list[str]:
    """Where the results are, and what to type next."""
    masks = plan.results / "export" / plan.params.method
    return [
        f"masks:      {masks / 'masks'}, and over the photos in {masks / 'overlays'}",
        f"report:     {plan.results / 'report.html'}",
        f"model:      {plan.model}",
        f"log:        {log}",
        f"new photos: wsss predict {plan.model} PHOTOS --out FOLDER",
        f"other tools: wsss export {plan.params.experiment} --formats coco,cvat,labelstudio,csv",
    ]
