"""Check the dataset in full; write index.json, which later stages read, and dataset.json, its census for the report."""

import json
import os
from pathlib import Path

from pipeline.data.build_index import build_index
from pipeline.workflow.stage import Work, progress, run


def main(work: Work) -> None:
    folder = work.job.params["saliency"]
    threads = work.runtime.threads or len(os.sched_getaffinity(0))
    survey = build_index(work.job.block, Path(folder) if folder else None, threads, progress)
    work.outputs["index"].write_text(json.dumps(survey.index, indent=1) + "\n")
    work.outputs["dataset"].write_text(survey.census.dump())
    print(survey.census.text(), flush=True)


if __name__ == "__main__":
    run("index", main)
