"""Download PASCAL VOC 2012 with the SBD's masks to dataset.root."""

from pipeline.data.download import download, is_complete, voc2012_aug
from pipeline.errors import PipelineError
from pipeline.stage import Work, progress, run


def main(work: Work) -> None:
    """Fill the folder where it is: a person's own files, saliency maps say, may lie there already and stay.

    Whole, it is moved to the temporary name from which the stage frame publishes it. Gigabytes are fetched only where
    something is missing.
    """
    root, folder = work.job.outputs["root"], work.outputs["root"]
    if folder.exists():  # killed after the move
        if root.exists():
            raise PipelineError(f"{folder}: left by a killed run, but {root} is there too; merge or remove one of them")
        folder.rename(root)
    release = voc2012_aug()
    if not is_complete(root, release):
        download(release, root, progress)
    root.rename(folder)


if __name__ == "__main__":
    run("download", main)
