"""Generate the demo dataset."""

import shutil

from pipeline.data.demo import generate
from pipeline.stage import Work, run


def main(work: Work) -> None:
    root = work.outputs["root"]
    if root.exists():
        shutil.rmtree(root)
    generate(root, work.job.block)


if __name__ == "__main__":
    run("demo", main)
