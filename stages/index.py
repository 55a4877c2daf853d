"""Check the dataset in full, and write index.json, from which later stages learn all they need to know about it."""

import json
import os
from pathlib import Path

from pipeline.data.build_index import build_index
from pipeline.workflow.stage import Work, progress, run


def main(work: Work) -> None:
    folder = work.job.params["saliency"]
    threads = work.runtime.threads or len(os.sched_getaffinity(0))
    index = build_index(work.job.block, Path(folder) if folder else None, threads, progress)
    work.outputs["index"].write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    run("index", main)
