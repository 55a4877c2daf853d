"""Check the dataset in full, and write its index and its census.

index.json describes all images. train.json is the part that trainings depend on, saliency.json that of the stage
saliency. Only the report reads dataset.json.
"""

import os
from functools import partial
from pathlib import Path

from pipeline.data.build_index import build_index
from pipeline.data.index import training_part, write
from pipeline.workflow.stage import Work, progress, run


def main(work: Work) -> None:
    folder = work.job.params["saliency"]
    threads = work.runtime.threads or len(os.sched_getaffinity(0))
    survey = build_index(
        work.job.block, Path(folder) if folder else None, threads, progress, partial(print, flush=True)
    )
    parts = {"index": survey.index, "train": training_part(survey.index)}
    parts["saliency"] = training_part(survey.index, maps=True)
    for name, part in parts.items():
        write(work.outputs[name], part)
    work.outputs["dataset"].write_text(survey.census.dump())
    print(survey.census.text(), flush=True)


if __name__ == "__main__":
    run("index", main)
