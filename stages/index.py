"""Check the dataset in full, and write its index and its census.

index.json, train.json, saliency.json, masks.json and true_boxes.json are the parts of the index that other stages read
(``pipeline.data.parts``). Only the report reads dataset.json, the census.
"""

import os
from functools import partial
from pathlib import Path

from pipeline.data.build_index import build_index
from pipeline.data.index import write
from pipeline.data.parts import parts
from pipeline.workflow.stage import Work, progress, run


def main(work: Work) -> None:
    folder = work.job.params["saliency"]
    threads = work.runtime.threads or len(os.sched_getaffinity(0))
    survey = build_index(
        work.job.block, Path(folder) if folder else None, threads, progress, partial(print, flush=True)
    )
    for name, part in parts(survey.index):
        write(work.outputs[name], part)
    work.outputs["dataset"].write_text(survey.census.dump())
    print(survey.census.text(), flush=True)


if __name__ == "__main__":
    run("index", main)
