"""Download PASCAL VOC 2012 and the masks of SBD to dataset.root."""

from pipeline.data.download import download, is_complete, voc2012_aug
from pipeline.workflow.stage import Work, progress, run


def main(work: Work) -> None:
    """Download the dataset unless it is already complete."""
    release, root = voc2012_aug(), work.outputs["root"]
    if not is_complete(root, release):
        download(release, root, progress)


if __name__ == "__main__":
    run("download", main)
