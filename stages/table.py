"""Report on one of the papers' tables: its figures beside the published ones, and whether its claims hold."""

import json
from pathlib import Path

from pipeline.config.schema import Params
from pipeline.config.tables import PlannedTable
from pipeline.data.index import Index
from pipeline.labels.crf import describe_crf
from pipeline.report import paper_table, seeds
from pipeline.report.inputs import read_json
from pipeline.report.metrics import Scores
from pipeline.report.page import Section, page
from pipeline.workflow.stage import Work, run


def main(work: Work) -> None:
    """Write report.html and table.json, and print the table."""
    params: Params = work.job.block
    table = params.tables[work.job.name]
    assert isinstance(table, PlannedTable)
    index = Index(work.inputs["index"])
    runs = seeds.split(params.every_seed, {}, read_json(work.inputs, "scores of "), {})
    measured = {seed: paper_table.measured(table, run.scores) for seed, run in runs.items()}
    scores = runs[params.seed].scores
    found = paper_table.outcomes(table, list(measured.values()))
    if table.per_class:
        figures = paper_table.per_class(table, scores, index.classes)
        whole = {row: {**figures.get(row, {}), **values} for row, values in measured[params.seed].items()}
        cells = paper_table.class_grid(table, whole, index.classes)
    else:
        cells = paper_table.grid(table, list(measured.values()))
    content = {
        "title": f"{table.title}.",
        "source": paper_table.source(table),
        "published_on": table.published_on,
        "note": table.note,
        "cells": cells,
        "reasons": [(" ".join(filter(None, row.text)), row.reason) for row in table.rows.values() if row.reason],
        "outcomes": found,
    }
    chart = paper_table.coverage(table, scores)
    html = page(
        f"{paper_table.label(table)} on {params.experiment}",
        f"{len(table.chains)} rows, measured on {Path(params.dataset.root).name}.",
        [
            Section("Table", "table.html.j2", content),
            Section("Evolution of attention", "curves.html.j2", {"charts": [chart]} if chart else {}),
            Section("Measured here on", "conditions.html.j2", {"facts": _facts(params, index, scores)}),
        ],
    )
    work.outputs["report"].write_text(html, encoding="utf-8")
    record = paper_table.record(table, measured, found)
    work.outputs["table"].write_text(json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n")
    print(paper_table.text(table, cells, found), flush=True)


def _facts(params: Params, index: Index, scores: Scores) -> list[tuple[str, str]]:
    """The conditions of the figures, as (term, description)."""
    splits = {entry["split"]: entry["images"] for entry in scores.values()}
    scored = "; ".join(
        f"{split}: {len(index.images(split))} images, {count} with masks" for split, count in splits.items()
    )
    kinds = sorted({kind for entry in scores.values() for kind in entry["arithmetic"]})
    test, saliency = params.test, params.saliency
    scales = ", ".join(f"{scale:g}" for scale in test.scales)
    first = f"; curves, figures by class and those of claims are of seed {params.seed}" if params.further_seeds else ""
    return [
        ("Dataset", f"{Path(params.dataset.root).name}, {index.num_classes} classes and background"),
        ("Scored on", scored),
        ("Saliency", saliency.kind + (f" {saliency.path}" if saliency.path else "")),
        ("Test", f"scales {scales}; flip {'on' if test.flip else 'off'}; dense CRF {describe_crf(test.crf)}"),
        ("Seeds" if params.further_seeds else "Seed", ", ".join(map(str, params.every_seed)) + first),
        ("Computed in", "; ".join(kinds) or "not recorded"),
    ]


if __name__ == "__main__":
    run("table", main)
