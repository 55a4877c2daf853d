"""The workflow as DVC sees it. ``python -m pipeline.workflow.dvc`` writes dvc.yaml, whose commands run the jobs.

DVC keeps a stage's outputs (``persist``), and its command asks the manifest before anything else: what DVC starts
although it is up to date ends within a second. So what DVC takes for changed may be more than what is: any code.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline import runtime
from pipeline.config import params as parameters
from pipeline.config.schema import Params
from pipeline.config.stage_table import EXTERNAL, FOLDERS, SECTIONS, STAGES, Stage, sections
from pipeline.errors import PipelineError
from pipeline.stores import manifest
from pipeline.workflow.graph import Graph, Job, is_fresh

HEADER = """\
# Generated from pipeline/config/stage_table.py; to change it: python -m pipeline.workflow.dvc > dvc.yaml
# A block must name its source, model or labels itself, since a dependency on `defaults` cannot be written here.
"""
RESULTS = "results/${experiment}"
PARAMS = Path("params.yaml")
UNKNOWN = ("download", "coco_stuff")  # stages without a place in dvc.yaml: they fill a folder that the user may share
ROWS = "rows"  # the stage, and the folder of its outputs, by which the others depend on ``rows`` of params.yaml
STAND_IN = "No row needed this file.\n"
NO_LOG = '{"steps": []}\n'  # nothing to plot
_ROWS: dict[str, Any] = {
    "cmd": f"python -m pipeline.workflow.dvc {ROWS}",
    "deps": [str(PARAMS)],  # no key of it: dvc demands that a key be there
    "outs": [f"{RESULTS}/{ROWS}"],
}


class _Inline(dict[str, Any]):
    """A mapping that dvc.yaml holds in one line."""


class _Dumper(yaml.SafeDumper):
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(_Inline, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data, True))


def document() -> str:
    """The text of dvc.yaml."""
    entries = {ROWS: _ROWS}
    for stage in STAGES.values():
        if stage.name not in UNKNOWN:
            for folder, section in sections(stage) or [("", "")]:
                entries[_name(stage, section)] = _stage(stage, folder, section)
    texts = [
        yaml.dump({"stages": {key: entry}}, Dumper=_Dumper, sort_keys=False, width=200)
        for key, entry in entries.items()
    ]
    return f"{HEADER}\nstages:\n" + "\n".join(text.removeprefix("stages:\n") for text in texts)


def name_of(job: Job) -> str:
    """The job's name in dvc.yaml."""
    name = _name(STAGES[job.stage], job.section)
    return f"{name}@{job.name.rpartition('/')[2]}" if job.name else name


def _name(stage: Stage, section: str) -> str:
    return f"{stage.name}_{section}" if len(sections(stage)) > 1 else stage.name


def _stage(stage: Stage, folder: str, section: str) -> dict[str, Any]:
    key = "${key}" if section else ""
    name = f"{folder}/{key}" if stage.full_names else key
    home = "/".join(filter(None, (RESULTS, stage.folder, name)))
    keys = [*filter(None, [stage.settings]), *stage.params]
    if stage.section:
        keys += [f"defaults.{section}", f"{section}.{key}"]
    if stage.name == "report":
        keys += ["defaults", *SECTIONS]
    body: dict[str, Any] = {
        "cmd": " ".join(filter(None, ("python -m pipeline.workflow.dvc run", stage.name, name))),
        "deps": [*_data(stage, folder, section, key), f"stages/{stage.name}.py", "pipeline"],
    }
    if keys:
        body["params"] = keys
    files = [f"{home}/{file}" for file in (*stage.writes, manifest.NAME)]
    body["outs"] = [_kept(file) for file in files if not file.endswith(("/log.json", "/metrics.json"))]
    if not stage.writes:
        body["outs"].insert(0, _kept("${dataset.root}"))
    if stage.trains:
        title = f"{stage.name.capitalize().replace('_', '-')} {key}: loss"
        body["plots"] = [_kept(f"{home}/log.json", x="step", y="loss", title=title)]
    if stage.name == "report":
        body["metrics"] = [_kept(file, cache=False) for file in ("metrics.json", f"{home}/metrics.json")]
    return {"foreach": f"${{{section}}}", "do": body} if section else body


def _kept(file: str, **more: Any) -> dict[str, _Inline]:
    """An output that DVC does not delete before it runs its stage."""
    return {file: _Inline(**more, persist=True)}


def _data(stage: Stage, folder: str, section: str, key: str) -> Iterator[str]:
    """The files and folders that the stage reads."""
    for external in stage.external:
        if external == "root":  # a path that params.yaml need not name cannot be written here
            yield f"${{{EXTERNAL[external].key}}}"
    for read in stage.reads.values():
        yield f"{RESULTS}/{read.job or f'${{item.{read.key}}}'}/{read.file}"
    for stem in stage.own:
        if file := FOLDERS[folder].output(stem):
            yield f"{RESULTS}/{folder}/{key}/{file}"
    if section:
        yield f"{RESULTS}/{ROWS}/{section}/{key}"
    if stage.name == "report":
        # Folders, since a list of blocks cannot be written here, and none that a section without blocks would lack: the
        # manifests of the evaluations hold the hashes of all maps and labels, and so, indirectly, of all models.
        folders = (ROWS, "ground_truth", "saliency", "features", "predictions", "evaluation")
        yield from (f"{RESULTS}/{name}" for name in folders)


def write_rows() -> None:
    """Write for each block of params.yaml whether a row needs it, in a file of its own: a dependency of its stages."""
    kept, whole = parameters.load([PARAMS]), _whole()
    folder = Path("results") / whole.experiment / ROWS
    shutil.rmtree(folder, ignore_errors=True)
    for section in SECTIONS:
        for name in getattr(whole, section):
            path = folder / section / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{'needed' if name in getattr(kept, section) else 'not needed'}\n")


def stand_in(graph: Graph) -> None:
    """Satisfy DVC for all jobs of params.yaml that no row needs: see ``_stand_in``."""
    needed = {(job.stage, job.name) for job in graph.jobs}
    for job in Graph(_whole()).jobs:
        if (job.stage, job.name) not in needed:
            _stand_in(job)


def _whole() -> Params:
    return parameters.load([PARAMS], {"rows": None})


def _stand_in(job: Job) -> None:
    """Write what is missing of the outputs of a job that no row needs, since DVC demands them: files that say so, and a
    manifest by which no stage takes them for results."""
    lacking = [path for path in job.outputs.values() if not path.exists()]
    for path in lacking:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(NO_LOG if path.suffix == ".json" else STAND_IN)
    if lacking:
        manifest.write(job.folder, stage="", outputs={path.name: "" for path in job.outputs.values()})


def run(stage: str, name: str) -> None:
    """Run a job of params.yaml unless it is up to date, or no row of the report needs it; in its program's process."""
    graph = Graph(parameters.load([PARAMS]))
    try:
        job = graph.find(stage, name)
    except PipelineError:
        job = Graph(_whole()).find(stage, name)
        _stand_in(job)
        print(f"{job.label}: no row of params.yaml's rows needs it", flush=True)
        return
    if is_fresh(job, {}):
        print(f"{job.label}: up to date", flush=True)
        return
    table = STAGES[stage]
    # DVC runs one job at a time, so that a second thread helps on a plain processor, too.
    threads = min(len(os.sched_getaffinity(0)), table.threads if runtime.gpus() else max(2, table.local_threads))
    command = [sys.executable, "-m", f"stages.{stage}", *filter(None, [name]), *table.arguments(threads)]
    os.execv(sys.executable, command)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.workflow.dvc", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser(ROWS, help="write which blocks the rows need")
    job = commands.add_parser("run", help="run a job as dvc.yaml's commands do")
    job.add_argument("stage", choices=list(STAGES))
    job.add_argument("name", nargs="?", default="")
    options = parser.parse_args(arguments)
    try:
        if options.command is None:
            print(document(), end="")
        elif options.command == ROWS:
            write_rows()
        else:
            run(options.stage, options.name)
    except PipelineError as error:
        for line in error.lines:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
