"""Export the masks of a trained row, or the content of a store, in the formats of other tools.

A row's network segments the photos of its dataset again, since it stores masks without probabilities. A label store
(labels.h5) holds masks without probabilities; other stores (maps.h5) hold probabilities of classes without a mask.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data import photos
from pipeline.data.index import Image, Index
from pipeline.errors import PipelineError, counted
from pipeline.stores import manifest
from wsss.folder import OutputFolder, parse_formats
from wsss.formats import FORMATS, Item
from wsss.options import add_options, load_model, report
from wsss.sources import Source

if TYPE_CHECKING:
    from pipeline.stores.raster import RasterStore

EPILOG = "The same command again exports only what is new or changed, or whose outputs are missing."
RESULTS = Path("results")
MODEL = "model.safetensors"
SPLITS = ("train", "evaluation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="EXPERIMENT[/ROW]|STORE.h5",
        help="an experiment (its row is the param 'method'), a row, or a store such as "
        "results/demo/pseudo_labels/oaa/labels.h5",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the output folder; default: results/EXPERIMENT/export/ROW"
    )
    parser.add_argument("--split", choices=("all", *SPLITS), default="all", help="the photos; default: all")
    parser.add_argument(
        "--use-tags",
        choices=("all", "train", "none"),
        default="all",
        help="the photos whose tags bar all other classes; default: all that have tags. With 'train' the masks of "
        "evaluation photos are those that were scored",
    )
    add_options(parser)


def run(options: argparse.Namespace) -> int:
    """Export a row or a store and return the exit status: 1 if some photos are broken.

    Raises:
        PipelineError: the target does not exist, or it lacks what a format needs.
    """
    formats = parse_formats(options.formats)
    if options.target.endswith(".h5"):
        return _export_store(Path(options.target), options, formats)
    return _export_row(*find_row(options.target), options, formats)


def find_row(target: str) -> tuple[Path, str]:
    """The experiment's folder and the name of the row.

    Raises:
        PipelineError: the experiment or the row does not exist.
    """
    path = Path(target)
    if path.parts[:1] != RESULTS.parts and not path.exists():
        path = RESULTS / path
    if (path / "predictions").is_dir():
        record = manifest.read(path) or {}
        row = record.get("params", {}).get("method")
        choices = ", ".join(sorted(model.parent.name for model in (path / "predictions").glob(f"*/{MODEL}")))
        if row is None or not (path / "predictions" / row / MODEL).is_file():
            raise PipelineError(f"{path}: name one of its rows, {path}/ROW: {choices or 'none is trained yet'}")
        return path, row
    for folder in (path.parent, path.parent.parent):  # EXPERIMENT/ROW or EXPERIMENT/predictions/ROW
        if (folder / "predictions" / path.name / MODEL).is_file():
            return folder, path.name
    raise PipelineError(f"{target}: no such experiment or row in {RESULTS}/; run it first, or correct the name")


def _export_row(experiment: Path, row: str, options: argparse.Namespace, formats: list[str]) -> int:
    home = (
        experiment if (experiment / "index").is_dir() else experiment.parent
    )  # a further seed has no index of its own
    index = Index(home / "index" / "index.json")
    model, basis = load_model(experiment / "predictions" / row / MODEL, options)
    folder = OutputFolder(options.out or experiment / "export" / row)
    from wsss.segment import Task, segment

    tasks = []
    tagged = any(image.tags for image in index.images("evaluation"))  # all of them are, or none
    for image, split in _images(index, options.split):
        known = options.use_tags in ("all", split) and (tagged or split == "train")
        tags = tuple(model.classes[tag] for tag in image.tags) if known else None
        tasks.append(Task(_source(image), tags, max(photos.PIXELS, image.file_pixels)))
    outcome = segment(model, tasks, folder, formats, basis)
    others = folder.join(formats, model.classes, lambda record: basis.items() <= record.basis.items())
    return report(folder, outcome.counts(), others, outcome.faults)


def _images(index: Index, split: str) -> Iterator[tuple[Image, str]]:
    for name in SPLITS:
        if split in ("all", name):
            yield from ((image, name) for image in index.images(name))


def _source(image: Image) -> Source:
    return Source(image.file, f"{image.id}{image.file.suffix}")


def _export_store(path: Path, options: argparse.Namespace, formats: list[str]) -> int:
    from pipeline.data.images import read_rgb
    from pipeline.stores.raster import open_foreign

    if not path.is_file():
        raise PipelineError(f"{path}: no such file; name a store, such as results/demo/saliency/maps.h5")
    basis = {"store": manifest.verify(path)}
    experiment = next((folder for folder in path.parents if (folder / "index" / "index.json").is_file()), None)
    if experiment is None:
        raise PipelineError(f"{path}: lies outside of an experiment's results; name a store in {RESULTS}/EXPERIMENT")
    index, store = Index(experiment / "index" / "index.json"), open_foreign(path)
    has = "mask" if store.kind == "labels" else "levels"
    if lacking := [name for name in formats if FORMATS[name].needs != has]:
        right = ", ".join(name for name, form in FORMATS.items() if form.needs == has)
        raise PipelineError(f"--formats {','.join(lacking)}: {path} has no {_MISSING[has]}; choose from {right}")
    classes = ("background" if has == "mask" else store.kind, *index.classes)
    folder = OutputFolder(options.out or experiment / "export" / path.parent.relative_to(experiment))
    written = current = 0
    for image in _stored(index, store, options.split):
        source = _source(image)
        if folder.is_current(source, basis, formats):
            current += 1
            continue
        names = [name for name in folder.all_formats(source, formats) if FORMATS[name].needs == has]
        rgb = read_rgb(image) if any(FORMATS[name].needs_photo for name in names) else None
        maps = store.maps(image.id)
        item = Item(folder.name(source), source.relative, image.height, image.width, classes, maps.get(0), rgb, maps)
        folder.write(source, item, basis, names)
        written += 1
    if not written and not current:
        raise PipelineError(f"{path}: has none of the dataset's images in --split {options.split}; nothing is exported")
    others = folder.join(formats, classes, lambda record: record.basis == basis)
    return report(folder, f"{counted(written, 'image')} exported, {current} up to date", others, [])


_MISSING = {"mask": "probabilities", "levels": "masks"}


def _stored(index: Index, store: "RasterStore", split: str) -> Iterable[Image]:
    """The images of the split that have a raster in the store."""
    return (image for image, _ in _images(index, split) if image.id in store and store.classes(image.id))
