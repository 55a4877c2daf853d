"""Generate the demo dataset."""

import shutil

from pipeline.data.demo import MARK, generate
from pipeline.errors import PipelineError
from pipeline.workflow.stage import Work, run


def main(work: Work) -> None:
    old = work.job.outputs["root"]
    if old.exists() and any(old.iterdir()) and not (old / MARK).exists():
        raise PipelineError(
            f"{old}: holds something else than the demo; set dataset.demo to null, or dataset.root anew"
        )
    root = work.outputs["root"]
    if root.exists():
        shutil.rmtree(root)
    generate(root, work.job.block)


if __name__ == "__main__":
    run("demo", main)
