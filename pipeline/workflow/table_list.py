"""docs/TABLES.md: all of the papers' tables with their profiles, costs and outcomes.

``python -m pipeline.workflow.table_list > docs/TABLES.md`` generates it. The outcomes are those of docs/outcomes.json.
``python -m pipeline.workflow.table_list --record EXPERIMENT REMARK`` adds those in results/EXPERIMENT/tables to this
file, with a remark that names the commit and the machine.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

from pipeline.config import params as parameters
from pipeline.errors import counted
from pipeline.workflow import closure
from pipeline.workflow.cost import trainings
from pipeline.workflow.graph import Graph

ROOT = closure.ROOT
PROFILES = sorted(
    (ROOT / "profiles" / "tables").glob("*.yaml"),
    key=lambda path: [int(part) if part.isdigit() else part for part in path.stem.replace("fig_", "99_").split("_")],
)
OUTCOMES = ROOT / "docs" / "outcomes.json"
WIDTH = 120
TEXT = """\
# The papers' tables

<!-- Generated: python -m pipeline.workflow.table_list > docs/TABLES.md -->

Each file in profiles/tables is one table of a paper: its rows, the published figures, and the claims that the paper
draws from them. It lies on any profile, whose sizes, rates and thresholds its rows inherit:

```sh
snakemake --cores all --configfile params.yaml profiles/tables/oaa_4.yaml  # on the demo
snakemake --cores 2 --configfile params.yaml profiles/voc12_mini.yaml profiles/tables/oaa_4.yaml  # on real images
snakemake --cores all --configfile params.yaml profiles/voc2012.yaml profiles/tables/oaa_4.yaml  # on VOC 2012
snakemake --cores all --configfile params.yaml profiles/tables/*.yaml  # all tables, on the demo
```

The run begins by printing how many trainings it needs and how long such trainings took. It ends with
results/EXPERIMENT/tables/TABLE/report.html. It shows the paper's table with our figures beside the published ones, and
below it whether each claim holds here. Tables share the results of the profile beneath and of each other: a block that
two of them need is trained once.

## Tables that run

All {tables} tables together need {every} trainings on the demo. {shared} of these belong to the demo's own rows.

{table}

## Outcomes

Scores differ between seeds: a final mIoU on the demo by about 1.5 points. With one seed, an outcome that depends on a
smaller difference is undecided.

{outcomes}

## Tables that do not run

| table | reason |
|---|---|
{missing}
"""
MISSING = {
    "OAA Tables 1 to 3": "They compare methods on the val and test sets of VOC. The other methods are not part of the "
    "project. The report on VOC shows the published figures of this paper's rows",
    "OAA Table 14": "It is about boxes: profiles/cub.yaml runs it, and its report shows the published rows below "
    "ours. profiles/demo_boxes.yaml and profiles/voc12_mini_boxes.yaml have other images",
    "DRS Table 4": "It compares methods. DRS's own rows in it are `drs_refined` with three networks, which "
    "profiles/voc2012.yaml runs",
    "AMR Table 1": "It compares methods. AMR's own row in it is `amr_irn_deeplab_v2` of profiles/voc2012.yaml",
    "AMR Table 6": "Its first two rows are in AMR's Table 2. No network here joins SEAM and AMR",
    "EDAM Tables 1 and 2": "They compare methods. EDAM's own row in them is `edam_saliency_deeplab_v2` of "
    "profiles/voc2012.yaml, on another network",
    "EDAM Table 3": "Its 3,995 images of Caltech-256 were selected by hand, and the selection is not published. "
    "`dataset.extra` takes such images",
    "EDAM Table 4": "Its 76,683 web images are not at hand. `dataset.extra` takes such images",
    "AGEN Table 4": "It compares one-step methods by class. AGEN's own mIoU is in its Table 5 here",
}


def document() -> str:
    """Return the text of docs/TABLES.md."""
    base = ROOT / "params.yaml"
    own = {job.label for job in Graph(parameters.load([base])).jobs}
    every = Graph(parameters.load([base, *PROFILES])).jobs
    lines = [
        "| table | what it compares | profile | trainings on the demo | ... not of its own rows | claims |",
        "|---|---|---|---|---|---|",
    ]
    for file in PROFILES:
        params = parameters.load([base, file])
        table, jobs = params.tables[file.stem], Graph(params).jobs
        new = trainings([job for job in jobs if job.label not in own])
        cost = f"{trainings(jobs).total()} | {new.total()}"
        path = f"[{file.stem}](../profiles/tables/{file.name})"
        lines.append(f"| {table.paper} {table.number} | {table.title} | {path} | {cost} | {len(table.claims)} |")
    counts: Counter[str] = trainings(every)
    shared = trainings([job for job in every if job.label in own])
    missing = "\n".join(f"| {name} | {reason} |" for name, reason in MISSING.items())
    return TEXT.format(
        tables=len(PROFILES),
        every=counts.total(),
        shared=shared.total(),
        table="\n".join(lines),
        outcomes="\n".join(_outcomes()),
        missing=missing,
    )


def _outcomes() -> Iterator[str]:
    """Yield the lines on the tables that have been measured: a table of claims for each dataset and run."""
    recorded = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {}
    order = [file.stem for file in PROFILES]
    for dataset, tables in recorded.items():
        for remark in dict.fromkeys(entry["remark"] for entry in tables.values()):
            names = [*(name for name in order if name in tables), *(name for name in tables if name not in order)]
            run = [tables[name] for name in names if tables[name]["remark"] == remark]
            tested = [claim for entry in run for claim in entry["claims"] if claim["seeds"]]
            holds = f"{sum(claim['holds'] == claim['seeds'] for claim in tested)} of {len(tested)} measured claims"
            yield fill(f"**On {dataset}**, {holds} of {counted(len(run), 'table')} hold. {remark}", WIDTH)
            yield ""
            yield "| table | claim | outcome | figures |"
            yield "|---|---|---|---|"
            for entry in run:
                for claim in entry["claims"]:
                    yield f"| {entry['table']} | {claim['claim']} | {_verdict(claim)} | {claim['figures']} |"
            yield ""
    if missing := [name for name in order if name not in recorded.get("demo", {})]:
        yield fill(f"Not measured on the demo: {', '.join(missing)}. [TRIALS.md](TRIALS.md) has earlier trials.", WIDTH)


def _verdict(claim: dict[str, Any]) -> str:
    if not claim["seeds"]:
        return "not measured"
    if claim["seeds"] > 1:
        return f"holds in {claim['holds']} of {claim['seeds']} seeds"
    return "holds" if claim["holds"] else "**does not hold**"


def record(experiment: str, remark: str) -> None:
    """Add the outcomes of results/EXPERIMENT/tables to docs/outcomes.json."""
    recorded = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {}
    for file in sorted(Path("results", experiment, "tables").glob("*/table.json")):
        entry = json.loads(file.read_text())
        recorded.setdefault(experiment, {})[file.parent.name] = {**entry, "remark": remark}
    OUTCOMES.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        record(*sys.argv[2:])
    else:
        print(document(), end="")
