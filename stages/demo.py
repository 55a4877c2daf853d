"""Generate the demo dataset."""

import shutil

from pipeline.data.demo import MARK, generate
from pipeline.errors import PipelineError
from pipeline.workflow.stage import Work, run


def main(work: Work) -> None:
    old = work.job.outputs["root"]
    if old.exists() and any(old.iterdir()) and not (old / MARK).exists():
        raise PipelineError(
            f"{old}: contains something other than the demo; set dataset.demo to null, or choose another dataset.root"
        )
    root = work.outputs["root"]
    if root.exists():
        shutil.rmtree(root)
    generate(root, work.job.block)


if __name__ == "__main__":
    run("demo", main)
