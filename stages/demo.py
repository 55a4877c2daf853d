"""Generate the demo dataset."""

from pipeline.data.demo import LOST, MARK, generate
from pipeline.errors import PipelineError
from pipeline.workflow.stage import Work, run


def main(work: Work) -> None:
    root = work.outputs["root"]
    if root.exists() and any(path.name != LOST for path in root.iterdir()) and not (root / MARK).exists():
        raise PipelineError(
            f"{root}: contains something other than the demo; set dataset.demo to null, or choose another dataset.root"
        )
    generate(root, work.job.block)


if __name__ == "__main__":
    run("demo", main)
