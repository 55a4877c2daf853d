"""Segment new photos with a model file."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.data.faults import Faults
from pipeline.errors import PipelineError
from wsss.folder import OutputFolder, parse_formats
from wsss.options import add_options, load_model, report
from wsss.sources import Source, find

EPILOG = "The same command again segments only photos that are new or changed, or whose outputs are missing."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="a model file, such as results/demo/predictions/oaa/model.safetensors"
    )
    parser.add_argument(
        "photos",
        nargs="+",
        metavar="PHOTO",
        help="files, folders, lists (.txt, a path a line), or - for a list on stdin",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the output folder")
    parser.add_argument(
        "--tags", type=Path, metavar="FILE", help="tags of photos, which bar all other classes (data/README.md)"
    )
    add_options(parser)


def run(options: argparse.Namespace) -> int:
    """Segment the photos and return the exit status: 1 if some are broken.

    Raises:
        PipelineError: the model, a path, the tags or an option is wrong.
    """
    from pipeline.inference.model_file import read_metadata

    faults: list[str] = []
    with collected(faults):
        formats = parse_formats(options.formats)
    with collected(faults):
        sources = find(options.photos, options.out)
    with collected(faults):
        classes = ("background", *read_metadata(options.model)["classes"])
    tags: dict[str, tuple[str, ...]] = {}
    if not faults and options.tags:
        with collected(faults):
            tags = read_tags(options.tags, classes, sources)
    if faults:
        raise PipelineError(*faults)
    folder = OutputFolder(options.out)
    model, basis = load_model(options.model, options)
    from wsss.segment import Task, segment

    outcome = segment(model, [Task(source, tags.get(source.key)) for source in sources], folder, formats, basis)
    others = folder.join(formats, model.classes, lambda record: basis.items() <= record.basis.items())
    return report(folder, outcome.counts(), others, outcome.faults)


@contextmanager
def collected(faults: list[str]) -> Iterator[None]:
    """Append the lines of a PipelineError, so that all faults are reported together."""
    try:
        yield
    except PipelineError as error:
        faults.extend(error.lines)


def read_tags(path: Path, classes: Sequence[str], sources: Sequence[Source]) -> dict[str, tuple[str, ...]]:
    """Class names by ``Source.key``. Photos without an entry are left out, so that they may have any class.

    Args:
        classes: the name of each class id, background first.

    Raises:
        PipelineError: the file cannot be read, or a tag is not a class; it has a line for each fault.
    """
    from pipeline.data.tags import read_tags as read

    faults = Faults()
    tags = read(path, classes[1:], {source.key: source.relative for source in sources}, faults).by_image
    faults.check()
    return {key: tuple(classes[number] for number in ids) for key, ids in tags.items()}
