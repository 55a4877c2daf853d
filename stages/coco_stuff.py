"""Convert COCO-Stuff 10k into a dataset in VOC layout at dataset.root."""

from pipeline.data.coco_stuff import convert
from pipeline.workflow.stage import Work, progress, run


def main(work: Work) -> None:
    left_out = convert(work.inputs["coco_stuff"], work.outputs["root"], progress)
    print(f"{work.job.label}: {left_out} training images without any VOC class were left out", flush=True)


if __name__ == "__main__":
    run("coco_stuff", main)
