"""Collect the scores of all rows in metrics.json and report.html, with a gallery of the user's own photos."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.data import census
from pipeline.data.index import Index
from pipeline.report import boxes, metrics, seeds
from pipeline.report.inputs import read_json
from pipeline.report.photos import PhotoGallery, Pictures, sources
from pipeline.report.sections import Results, document
from pipeline.stores.raster import RasterStore
from pipeline.workflow.stage import Work, progress, run


def main(work: Work) -> None:
    """Write the report, the table of all rows and the scores of the selected method; print the table."""
    rows, method = work.job.params["rows"], work.job.params["method"]
    scores, logs = read_json(work.inputs, "scores of "), read_json(work.inputs, "log of ")
    runs = seeds.split(work.job.params["seeds"], rows, scores, logs)
    results = Results(
        params=work.job.block,
        index=Index(work.inputs["index"]),
        census=census.read(work.inputs["census"]),
        rows=rows,
        runs=runs,
        layers=read_json(work.inputs, "layers of "),
        boxes=boxes.read(read_json(work.inputs, "boxes of ")),
        stores={name: RasterStore(path) for name, path in work.inputs.items() if path.suffix == ".h5"},
    )
    if "pictures" in work.outputs:
        results = replace(results, photos=_photos(work, results))
    work.outputs["report"].write_text(document(results), encoding="utf-8")
    boxed = boxes.metrics(runs)
    _write(work.outputs["table"], seeds.table(runs) | boxed)
    if "metrics" in work.outputs:
        _write(work.outputs["metrics"], seeds.headline(method, rows, runs) if rows else boxed)
    if rows:
        spread = {row: str(found["miou"]) for row, found in seeds.ranges(runs).items() if "miou" in found}
        print(metrics.text_table(results.metrics, rows, method, spread), flush=True)
    if rows and results.seeds:
        print(f"means over the seeds {results.seeds}; the last column is the range of the final mIoU", flush=True)
    if boxed:
        print(boxes.text_table(boxed), flush=True)
    if boxed and results.seeds:
        print(f"boxes: means over the seeds {results.seeds}", flush=True)
    if results.is_mixed:
        print("warning: rows were computed in different arithmetic; see the report's protocol", flush=True)


def _photos(work: Work, results: Results) -> PhotoGallery:
    """Draw the pictures of all photos with the masks of the selected method, or those that are new since last time."""
    chain, stores = results.rows[results.params.method], results.stores
    doubt = stores.get(f"doubt of {chain['predictions']}")
    labels = None if chain.get("labels") == "ground_truth" else stores.get(chain.get("labels", ""))
    found = sources(results.index, stores[chain["predictions"]], doubt, labels)
    published = work.job.outputs["pictures"]
    pictures = Pictures(work.outputs["pictures"], published, work.job.code)
    threads = len(os.sched_getaffinity(0))
    photos = pictures.draw_all(found, threads, lambda items: progress(items, f"{work.job.label}: photos"))
    return PhotoGallery(published.name, results.names, photos, results.params.method)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n")


if __name__ == "__main__":
    run("report", main)
