"""The workflow for DVC. ``python -m pipeline.workflow.dvc`` prints dvc.yaml; its commands run jobs through this module.

DVC keeps the outputs of a stage (``persist``), and each command first checks the job's manifest. If the job is up to
date, the command ends within a second. So DVC's dependencies may be broader than the job's: they include all code.
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline import cards, runtime
from pipeline.config import params as parameters
from pipeline.config.dataset import PREPARATION_STAGES
from pipeline.config.schema import Params
from pipeline.config.stage_table import EXTERNAL, FOLDERS, SECTIONS, STAGES, Input, Stage, sections
from pipeline.errors import PipelineError, exit_on_faults, warn
from pipeline.stores import manifest
from pipeline.workflow.freshness import is_fresh
from pipeline.workflow.graph import Graph, Job, missing
from pipeline.workflow.left_out import LeftOut

HEADER = """\
# Generated from pipeline/config/stage_table.py. To regenerate: python -m pipeline.workflow.dvc > dvc.yaml
# Each block must set its own source, model or labels: DVC cannot resolve dependencies that come from `defaults`.
# Regenerate it after you set or remove dataset.extra or saliency.path: DVC cannot resolve a missing key.
# Regenerate it after you set or remove dataset.demo: without a demo, no stage writes dataset.root.
# If `seeds` is set, regenerate it after any change of `seeds` or `segmentations`.
"""
RESULTS = "results/${experiment}"
PARAMS, DVC_YAML = Path("params.yaml"), Path("dvc.yaml")
# Not in dvc.yaml: users may keep other files in the output folders of some stages; the first report is only a preview;
# params.yaml has no tables.
EXCLUDED = (*(stage.name for stage in STAGES.values() if stage.keeps_user_files), "first_report", "table")
# DVC tells a command its stage in this variable. A name in the command itself would be interpreted by the shell.
CURRENT = "DVC_STAGE"
ROWS = "rows"  # the stage, and its output folder, through which others depend on ``rows`` of params.yaml
PLACEHOLDER = "No row needed this file.\n"
NO_LOG = '{"steps": []}\n'  # nothing to plot
COMMAND = "python -m pipeline.workflow.dvc > dvc.yaml"
GENERATE = f"to regenerate it: {COMMAND}"


class _Inline(dict[str, Any]):
    """A mapping that is written on one line."""


class _Dumper(yaml.SafeDumper):
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(_Inline, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data, True))


def document() -> str:
    """Return the text of dvc.yaml."""
    rows = {
        "cmd": f"python -m pipeline.workflow.dvc {ROWS}",
        "deps": [str(PARAMS)],  # not params: DVC fails if the key ``rows`` is missing
        "outs": [_persistent(f"{RESULTS}/{ROWS}")],
    }
    entries: dict[str, dict[str, Any]] = {ROWS: rows}
    params = _unfiltered()
    supplied = {(job.stage, name) for job in Graph(params).jobs for name in job.inputs if name in EXTERNAL}
    prefixes = [f"seed_{seed}/" for seed in params.further_seeds]
    unused = [name for name in PREPARATION_STAGES if name not in params.dataset.preparation_stages]
    for stage in STAGES.values():
        if stage.name in (*EXCLUDED, *unused):
            continue
        files = [EXTERNAL[name].key for name in stage.external if (stage.name, name) in supplied]
        for prefix in ["", *prefixes] if stage.has_many_jobs and not stage.first_seed_only else [""]:
            for folder, section in sections(stage) or [("", "")]:
                entry = _stage(stage, folder, section, files, prefix)
                if prefix and any(map(_is_mixed, stage.reads.values())):
                    entry["foreach"] = _resolved(params, stage, prefix)
                entries[_name(stage, section, prefix)] = entry
    scored = ["evaluation", *(["box_scores"] if params.boxes else [])]
    entries["report"]["deps"] += [f"{RESULTS}/{prefix}{folder}" for prefix in prefixes for folder in scored]
    texts = [
        yaml.dump({"stages": {key: entry}}, Dumper=_Dumper, sort_keys=False, width=200)
        for key, entry in entries.items()
    ]
    return f"{HEADER}\nstages:\n" + "\n".join(text.removeprefix("stages:\n") for text in texts)


def name_of(job: Job) -> str:
    """Return the name of a job in dvc.yaml."""
    name = _name(STAGES[job.stage], job.section, job.prefix)
    return f"{name}@{job.name.rpartition('/')[2]}" if job.name else name


def _name(stage: Stage, section: str, prefix: str = "") -> str:
    """Return the name of a stage; ``prefix`` is 'seed_N/' for a further seed."""
    parts = (stage.name, section if len(sections(stage)) > 1 else "", prefix.rstrip("/"))
    return "_".join(filter(None, parts))


def _is_mixed(read: Input) -> bool:
    """Whether some blocks read a job that all seeds share, and others one with their own seed."""
    return not set(read.allowed) <= set(SECTIONS)


def _resolved(params: Params, stage: Stage, prefix: str) -> dict[str, _Inline]:
    """Map each block of the stage, with a further seed, to the folders in results/EXPERIMENT that it refers to.

    DVC cannot derive them from params.yaml if ``_is_mixed``.
    """
    keys = [read.key for read in stage.reads.values() if read.key]
    return {
        name: _Inline(
            {key: reference if (reference := getattr(block, key)) in STAGES else f"{prefix}{reference}" for key in keys}
        )
        for name, block in getattr(params, stage.section).items()
    }


def _stage(stage: Stage, folder: str, section: str, user_files: list[str], prefix: str) -> dict[str, Any]:
    """Return the entry of a stage.

    Args:
        user_files: keys of params.yaml that hold paths of its external inputs.
        prefix: 'seed_N/' for a further seed.
    """
    key = "${key}" if section else ""
    name = f"{folder}/{key}" if stage.qualified_names else key
    output_folder = "/".join(filter(None, (RESULTS, prefix.rstrip("/"), stage.folder, name)))
    # DVC fails if a key is missing, so it gets the mapping that a key such as dataset.working_megapixels lies in.
    own = [key for key in stage.params if not (prefix and key == "seed")]  # ``seed`` is that of other jobs
    keys = [*filter(None, [stage.settings]), *(key.split(".")[0] for key in own)]
    if stage.section:
        keys += [f"defaults.{section}", f"{section}.{key}"]
    if stage.name == "report":
        keys += ["defaults", *SECTIONS]
    body: dict[str, Any] = {
        "cmd": "python -m pipeline.workflow.dvc run",
        "deps": [
            *(f"${{{key}}}" for key in user_files),
            *_data(stage, folder, section, key, prefix),
            f"stages/{stage.name}.py",
            "pipeline",
        ],
    }
    if keys:
        body["params"] = keys
    files = [f"{output_folder}/{file}" for file in (*stage.writes, manifest.NAME)]
    body["outs"] = [_persistent(file) for file in files if not file.endswith(("/log.json", "/metrics.json"))]
    if not stage.writes:
        body["outs"].insert(0, _persistent("${dataset.root}"))
    if stage.trains:
        title = f"{stage.name.capitalize().replace('_', '-')} {prefix}{key}: loss"
        body["plots"] = [_persistent(f"{output_folder}/log.json", x="step", y="loss", title=title)]
    if stage.name == "report":
        body["metrics"] = [_persistent(file, cache=False) for file in ("metrics.json", f"{output_folder}/metrics.json")]
    return {"foreach": f"${{{section}}}", "do": body} if section else body


def _persistent(file: str, **more: Any) -> dict[str, _Inline]:
    """Declare an output that DVC does not delete before it runs the stage, and thus before the params are checked."""
    return {file: _Inline(**more, persist=True)}


def _data(stage: Stage, folder: str, section: str, key: str, prefix: str) -> Iterator[str]:
    """Yield the files and folders that the stage reads and that other stages write."""
    for read in stage.reads.values():
        reference = f"{'' if _is_mixed(read) else prefix}${{item.{read.key}}}"  # else see ``_resolved``
        yield f"{RESULTS}/{read.job or reference}/{read.file}"
    for stem in stage.target_files:
        if file := FOLDERS[folder].output(stem):
            yield f"{RESULTS}/{prefix}{folder}/{key}/{file}"
    if section:
        yield f"{RESULTS}/{ROWS}/{section}/{key}"
    if stage.name == "report":
        # DVC cannot express one dependency per block, so these are folders, and only those that always exist. The
        # manifests of the evaluations contain the hashes of all maps and labels and thus cover all models indirectly.
        folders = [ROWS, "saliency", "features", "predictions", "evaluation"]
        folders += ["box_scores"] if _unfiltered().boxes else []
        yield from (f"{RESULTS}/{name}" for name in folders)


def write_rows(notice: parameters.Notice = lambda line: None) -> None:
    """Write one file per block of params.yaml that says whether a row needs it. The block's stages depend on it."""
    selected, every = parameters.load([PARAMS], notice=notice), _unfiltered()
    if fault := seeds_fault():
        raise PipelineError(fault)
    folder = Path("results") / every.experiment / ROWS
    shutil.rmtree(folder, ignore_errors=True)
    for section in SECTIONS:
        for name in getattr(every, section):
            path = folder / section / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{'needed' if name in getattr(selected, section) else 'not needed'}\n")


def seeds_fault() -> str | None:
    """Say that dvc.yaml does not describe the seeds of params.yaml; None if it does."""
    text = DVC_YAML.read_text("utf-8") if DVC_YAML.exists() else ""
    if (_unfiltered().further_seeds or re.search(r"^  \w+_seed_\d+:$", text, re.MULTILINE)) and text != document():
        return f"dvc.yaml: does not describe the seeds of params.yaml; {GENERATE}"
    return None


def write_placeholders(graph: Graph) -> None:
    """Write placeholder outputs of all jobs of params.yaml that no row needs; see ``_write_placeholder``."""
    for job in LeftOut([PARAMS], {}, graph).jobs:
        if job.stage not in EXCLUDED:
            _write_placeholder(job)


def _unfiltered() -> Params:
    """Return the params of params.yaml with all rows."""
    return parameters.load([PARAMS], {"rows": None}, every_row=True)


def _write_placeholder(job: Job) -> None:
    """Write placeholders for the missing outputs of a job that no row needs, since DVC requires that outputs exist.

    The manifest is written too, so that no stage accepts the placeholders as results.
    """
    missing = [path for path in job.outputs.values() if not path.exists()]
    for path in missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(NO_LOG if path.suffix == ".json" else PLACEHOLDER)
    if missing:
        manifest.write(job.folder, stage="", outputs={path.name: "" for path in job.outputs.values()})


def _leave_out_preparation(name: str, graph: Graph) -> None:
    """Say that this stage does not prepare the dataset. Write the manifest that dvc.yaml declares if there is none.

    Raises:
        PipelineError: the dataset, which dvc.yaml declares too, does not exist.
    """
    if fault := missing(graph.find("index")).get(root := Path(graph.params.dataset.root)):
        raise PipelineError(fault)
    folder = graph.results / STAGES[name].folder
    if not (folder / manifest.NAME).exists():
        manifest.write(folder, stage="", outputs={})
    reason = f"dataset.{name} is null; DVC copies {root}, which dvc.yaml calls its output, until you run {COMMAND}"
    print(f"{name} is left out: {reason}", flush=True)


def run(name: str) -> None:
    """Run a job, unless it is up to date or left out. The stage replaces this process.

    Args:
        name: the job's name in dvc.yaml, such as 'classifier@base'.
    """
    graph = Graph(parameters.load([PARAMS]))
    job = find(graph.jobs, name)
    if job is None and name in PREPARATION_STAGES:
        _leave_out_preparation(name, graph)
        return
    if job is None:
        left_out = LeftOut([PARAMS], {}, graph)
        job = find(left_out.jobs, name)
        if job is None:
            raise PipelineError(f"{name}: no block of params.yaml; dvc.yaml and params.yaml must name the same blocks")
        _write_placeholder(job)
        print(left_out.line(job), flush=True)
        return
    if is_fresh(job, {}):
        print(f"{job.label}: up to date", flush=True)
        return
    text = DVC_YAML.read_text("utf-8") if DVC_YAML.exists() else ""
    for key in {EXTERNAL[key].key for key in job.inputs if key in EXTERNAL}:
        if f"${{{key}}}" not in text:
            print(
                f"warning: dvc.yaml does not know {key}, so DVC will not notice changes there; {GENERATE}", flush=True
            )
    entry = STAGES[job.stage]
    cores = runtime.default_cores(entry, job.processes)
    arguments = entry.arguments(cores, entry.gpu and bool(cards.visible()), job.processes)
    command = [sys.executable, "-m", f"stages.{job.stage}", *filter(None, [job.full_name]), *arguments]
    os.execv(sys.executable, command)


def find(jobs: Iterable[Job], name: str) -> Job | None:
    """Return the job with this name in dvc.yaml; None if there is none."""
    return next((job for job in jobs if name_of(job) == name), None)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.workflow.dvc", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser(ROWS, help="write whether the rows need each block")
    job = commands.add_parser("run", help="run one job; used by the commands in dvc.yaml")
    current = os.environ.get(CURRENT, "").rpartition(":")[2]  # FILE:NAME if DVC runs in another folder
    job.add_argument("name", nargs="?", default=current, help="name in dvc.yaml, such as classifier@base")
    with exit_on_faults():
        options = parser.parse_args(arguments)
        if options.command is None:
            print(document(), end="")
        elif options.command == ROWS:
            write_rows(warn)
        else:
            run(options.name)


if __name__ == "__main__":
    main()
