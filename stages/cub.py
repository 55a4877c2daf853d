"""Convert CUB-200-2011 into a dataset in VOC layout at dataset.root."""

from pipeline.data.cub import convert
from pipeline.workflow.stage import Work, progress, run


def main(work: Work) -> None:
    counts = convert(work.inputs["cub"], work.outputs["root"], progress)
    print(f"{work.job.label}: {counts.text()}", flush=True)


if __name__ == "__main__":
    run("cub", main)
