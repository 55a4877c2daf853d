"""Build the index of a dataset: read and check every file once, and report all faults together."""

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.schema import Dataset
from pipeline.data import census
from pipeline.data.census import Census, Sight
from pipeline.data.checks import IGNORE, InvalidFile, image_pixels, mask_values, saliency_values
from pipeline.data.class_file import read_classes
from pipeline.data.duplicates import Fingerprint, fingerprint
from pipeline.data.faults import LIMIT, Faults, hint
from pipeline.data.images import working_size
from pipeline.data.lists import IMAGE_SUFFIXES, read_list
from pipeline.data.tags import SHOWN, Tags, read_tags
from pipeline.data.tags.matching import Nearest
from pipeline.stores.files import read_regular
from pipeline.stores.raster import Raster

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]  # items, label, number of items
Fault = tuple[str, str]  # kind, line


@dataclass(frozen=True)
class ImageFiles:
    """The files of one image; paths are relative to the working directory unless absolute."""

    id: str
    image: Path
    mask: Path | None
    saliency: Path | None


@dataclass(frozen=True)
class ExtraImages:
    """Images of ``dataset.extra``.

    Attributes:
        files: image id -> files with that stem; more than one is a fault.
        tags: image id -> the class id of its folder.
    """

    files: dict[str, list[Path]] = field(default_factory=dict)
    tags: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """Results of reading the files of one image: its index entry, its faults, and its content for the census."""

    entry: dict[str, Any]
    faults: list[Fault]
    print: Fingerprint | None
    mask: NDArray[np.intp] | None


@dataclass(frozen=True)
class Survey:
    """The index of a dataset as ``pipeline.data.index`` reads it, and the census, which only the report may read."""

    index: dict[str, Any]
    census: Census


def build_index(
    dataset: Dataset,
    saliency: Path | None = None,
    threads: int = 1,
    progress: Progress = lambda items, label, total: items,
) -> Survey:
    """Check a dataset in VOC layout, decoding every file, and return its index and its census.

    Every training image needs an entry in the tags, which may be without a class. Every evaluation image needs a mask
    if ``dataset.masks`` is set. Tags and saliency maps of evaluation images are optional, but each must exist for all
    of them or for none. Images of ``dataset.extra`` are appended to the training list, sorted by class and id; each has
    the tag of its folder and no mask.

    Args:
        saliency: folder of grey PNG files with the images' stems and sizes.
        threads: number of threads that decode and hash files (both release the GIL).

    Raises:
        PipelineError: lists all faults, one per line, with at most ``faults.LIMIT`` of each kind.
    """
    faults = Faults()
    root = Path(dataset.root)
    classes = read_classes(root, dataset.classes, faults)
    lists = {"train": root / dataset.train, "evaluation": root / dataset.evaluation}
    images = _files_by_stem(root / dataset.images, IMAGE_SUFFIXES, "dataset.images", faults)
    splits = {split: read_list(path, faults, images or ()) for split, path in lists.items()}
    evaluation = set(splits["evaluation"])
    for name in splits["train"]:
        if name in evaluation:
            line = f"{lists['train']}: {name} is also in {lists['evaluation']}; take it out of one"
            faults.add("image in both lists", line)
    ids = list(dict.fromkeys(splits["train"] + splits["evaluation"]))
    tags = _checked_tags(dataset, classes, splits, images, faults)
    extra = _read_extra(Path(dataset.extra), classes, faults) if dataset.extra and classes else ExtraImages()
    splits["train"] += extra.files
    files_of_images = _match_files(dataset, ids, images, extra, splits, saliency, faults)
    results = _inspect_all(files_of_images, len(classes), dataset, threads, progress)
    for result in results:
        for kind, line in result.faults:
            faults.add(kind, line)
    counts = _count(dataset, classes, splits, {**tags.by_image, **extra.tags}, files_of_images, results, faults)
    counts = replace(counts, remarks=[*counts.remarks, *tags.remarks], source=tags.source)
    faults.check()
    entries = {}
    for files, result in zip(files_of_images, results, strict=True):
        entries[files.id] = {
            "file": Path(os.path.relpath(files.image, root)).as_posix(),
            "mask": files.mask and files.mask.relative_to(root).as_posix(),
            "saliency": files.saliency and files.saliency.as_posix(),
            "tags": list(extra.tags.get(files.id) or tags.by_image.get(files.id, ())),
            **result.entry,
        }
    tag_source = tags.source
    if extra.files:
        tag_source += f"; {len(extra.files)} images with single tags: {dataset.extra}"
    source = {"root": root.as_posix(), "classes": classes, "splits": splits, "tag_source": tag_source}
    return Survey({**source, "images": entries}, counts)


def _count(
    dataset: Dataset,
    classes: Sequence[str],
    splits: dict[str, list[str]],
    tags: dict[str, tuple[int, ...]],
    images: Sequence[ImageFiles],
    results: Sequence[Inspection],
    faults: Faults,
) -> Census:
    training = set(splits["train"])
    sights = [
        Sight(
            files.id,
            "train" if files.id in training else "evaluation",
            tags.get(files.id),
            tuple(result.entry.get("file_size") or (result.entry["height"], result.entry["width"])),
            result.print,
            result.mask,
        )
        for files, result in zip(images, results, strict=True)
        if "height" in result.entry
    ]
    root = Path(dataset.root)
    masks, refuse = root / (dataset.masks or ""), dataset.contradictions == "refuse"
    counts = census.take(sights, classes, root / dataset.evaluation, masks, refuse, faults)
    large = [result.entry for result in results if "file_size" in result.entry]
    if not large:
        return counts
    reduced = f"{len(large)} images are larger than dataset.working_megapixels and are reduced to "
    reduced += f"{dataset.working_megapixels:g} megapixels, with their masks; labels and scores are at that size"
    return replace(counts, remarks=[*counts.remarks, reduced])


def _checked_tags(
    dataset: Dataset,
    classes: Sequence[str],
    splits: dict[str, list[str]],
    images: dict[str, list[Path]] | None,
    faults: Faults,
) -> Tags:
    """Read the tags of the listed images; images without an entry become faults or negatives."""
    path = Path(dataset.root) / dataset.tags
    if not classes:
        return Tags({}, path.name)
    photos = {name: files[0].name for name, files in (images or {}).items()}
    listed = dict.fromkeys([*splits["train"], *splits["evaluation"]])
    photos |= {name: name for name in listed if name not in photos}
    faults_before = len(faults)
    tags = read_tags(path, classes, photos, faults, listed, dataset.other_classes)
    if not tags.by_image and len(faults) == faults_before and dataset.untagged == "refuse":
        some = f"; its entries name {', '.join(map(str, tags.unmatched[:3]))}" if tags.unmatched else ""
        line = f"{path}: read as {tags.source}, tags no listed image{some}"
        faults.add("tag file", f"{line}; correct dataset.tags, or tag the images")
    lacking = _images_without(tags.by_image, splits) if tags.by_image or dataset.untagged == "negative" else []
    remarks = [*tags.remarks]
    if tags.unmatched:
        some = ", ".join(map(str, tags.unmatched[:SHOWN]))
        more = f" and {len(tags.unmatched) - SHOWN} more" if len(tags.unmatched) > SHOWN else ""
        remarks.append(f"{len(tags.unmatched)} entries of {path.name} fit no image: {some}{more}")
    if dataset.untagged == "negative" and lacking:
        remarks.append(f"{len(lacking)} listed images have no entry in {path.name} and count as without a class")
        return replace(tags, by_image=tags.by_image | dict.fromkeys(lacking, ()), remarks=remarks)
    near = Nearest(map(str, tags.unmatched)) if lacking and tags.unmatched else None
    for number, name in enumerate(lacking):
        similar = near.like(name) if near and number < LIMIT else []
        fix = f"is it {similar[0]!r} there? Otherwise tag" if similar else "tag"
        line = f"{path}: has no entry for {name}; {fix} it or unlist it"
        faults.add("image not in the tags", f"{line}, or set dataset.untagged to negative")
    return replace(tags, remarks=remarks)


def _read_extra(folder: Path, classes: Sequence[str], faults: Faults) -> ExtraImages:
    """Collect the images of the class-named subfolders (not recursive), sorted by class id and image id."""
    faults_before = len(faults)
    try:
        names = sorted(name for name in os.listdir(folder) if os.path.isdir(folder / name) and not name.startswith("."))
    except OSError as error:
        faults.add("folder", f"{folder}: cannot be listed ({error.strerror}); create it or correct dataset.extra")
        return ExtraImages()
    for name in names:
        if name not in classes:
            fix = hint(name, classes, "rename or remove it")
            faults.add("extra folder", f"{folder / name}: is not named after any of dataset.classes; {fix}")
    extra = ExtraImages()
    for class_id, name in enumerate(classes, 1):
        stems = _files_by_stem(folder / name, IMAGE_SUFFIXES, "dataset.extra", faults) if name in names else {}
        for stem, files in sorted((stems or {}).items()):
            if not stem.isprintable():
                line = f"{str(files[0])!a}: its name is not printable UTF-8 text; rename it"
                faults.add("name of an image", line)
            extra.files.setdefault(stem, []).extend(files)
            extra.tags.setdefault(stem, (class_id,))
    if not extra.files and len(faults) == faults_before:
        line = f"{folder}: no class folder (such as {folder / classes[0]}) holds an image; add some"
        faults.add("extra folder", f"{line}, or set dataset.extra to null")
    return extra


def _images_without(available: Collection[str], splits: dict[str, list[str]]) -> list[str]:
    """Listed images that need an entry in ``available`` but have none.

    All training images need one. Evaluation images need one as soon as any of them has one.
    """
    needed = list(splits["train"])
    if any(name in available for name in splits["evaluation"]):
        needed += splits["evaluation"]
    return [name for name in dict.fromkeys(needed) if name not in available]


def _match_files(
    dataset: Dataset,
    ids: Sequence[str],
    images: dict[str, list[Path]] | None,
    extra: ExtraImages,
    splits: dict[str, list[str]],
    saliency: Path | None,
    faults: Faults,
) -> list[ImageFiles]:
    """Match listed and extra images to their files; images with missing or ambiguous files become faults."""
    root = Path(dataset.root)
    masks = _files_by_stem(root / dataset.masks, (".png",), "dataset.masks", faults) if dataset.masks else None
    maps = _files_by_stem(saliency, (".png",), "saliency.path", faults) if saliency else None
    if images is None:
        return []
    if dataset.masks and masks is not None:
        for name in splits["evaluation"]:
            if name not in masks:
                line = f"{root / dataset.masks / name}.png: missing, but it is an evaluation image; add it or unlist it"
                faults.add("missing mask", line)
    if saliency and maps is not None:
        for name in _images_without(maps, splits):
            line = f"{saliency / name}.png: missing; add it, or choose another saliency.kind"
            faults.add("missing saliency map", line)
    matched = []
    listed = set(ids)
    for name in dict.fromkeys([*ids, *extra.files]):
        own = images.get(name, []) if name in listed else []
        files = own + extra.files.get(name, [])
        if name in listed and not own:
            line = f"{root / dataset.images / name}.jpg (or .png): missing, but it is listed; add it or unlist it"
            faults.add("missing image", line)
        elif len(files) > 1:
            line = f"{files[0]}: {files[1]} has the same stem; remove or rename one of the two"
            faults.add("two images with one stem", line)
        else:
            mask, saliency_map = ((stems or {}).get(name, [None])[0] for stems in (masks, maps))
            matched.append(ImageFiles(name, files[0], mask if name in listed else None, saliency_map))
    return matched


def _files_by_stem(folder: Path, suffixes: tuple[str, ...], key: str, faults: Faults) -> dict[str, list[Path]] | None:
    """Files with one of ``suffixes`` by stem; None, and a fault, if the folder cannot be listed."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        faults.add("folder", f"{folder}: cannot be listed ({error.strerror}); create it or correct {key}")
        return None
    stems: dict[str, list[Path]] = {}
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in suffixes and not name.startswith("."):  # hidden files never count (``stores.hashes``)
            stems.setdefault(stem, []).append(folder / name)
    return stems


def _inspect_all(
    images: list[ImageFiles], num_classes: int, dataset: Dataset, threads: int, progress: Progress
) -> list[Inspection]:
    pool = ThreadPoolExecutor(threads)
    try:
        results = pool.map(partial(_inspect, num_classes=num_classes, dataset=dataset), images)
        return list(progress(results, "index: images checked", len(images)))
    finally:
        pool.shutdown(cancel_futures=True)


def _inspect(files: ImageFiles, num_classes: int, dataset: Dataset) -> Inspection:
    """Hash and decode the files of one image."""
    entry: dict[str, Any] = {}
    faults: list[Fault] = []

    def read(path: Path | None, kind: str, key: str, decode: Callable[[bytes, int], Any]) -> Any:
        entry[key] = None
        try:
            if path is not None:
                data = read_regular(path)
                entry[key] = hashlib.sha256(data).hexdigest()
                return decode(data, dataset.max_pixels)
        except InvalidFile as error:
            faults.append((kind, f"{path}: {error}"))
        except OSError as error:
            faults.append((kind, f"{path}: cannot be read ({error.strerror}); fix its permissions or the disk"))
        return None

    pixels: NDArray[np.uint8] | None = read(files.image, "unreadable image", "sha256", image_pixels)
    size = None if pixels is None else pixels.shape[:2]
    if size is not None:
        entry["height"], entry["width"] = working_size(size, dataset.working_megapixels)
        if (entry["height"], entry["width"]) != size:
            entry["file_size"] = list(size)
    mask: Raster | None = read(files.mask, "unreadable mask", "mask_sha256", mask_values)
    saliency: Raster | None = read(files.saliency, "unreadable saliency map", "saliency_sha256", saliency_values)
    for path, raster, name in ((files.mask, mask, "mask"), (files.saliency, saliency, "saliency map")):
        if raster is not None and size is not None and raster.shape != size:
            sizes = f"is {raster.shape[1]}x{raster.shape[0]}, but its image is {size[1]}x{size[0]}"
            faults.append((f"size of a {name}", f"{path}: {sizes}; make them equal"))
    counts = None if mask is None else np.bincount(mask.reshape(-1), minlength=256)
    wrong = _wrong_values(counts, num_classes) if counts is not None and num_classes else ""
    if wrong:
        line = f"{files.mask}: has the values {wrong}, but class ids are 0..{num_classes} and {IGNORE} (ignore)"
        faults.append(("value of a mask", f"{line}; correct it, or dataset.classes"))
    return Inspection(entry, faults, None if pixels is None else fingerprint(pixels), counts)


def _wrong_values(counts: NDArray[np.intp], num_classes: int) -> str:
    """Format up to five mask values that are neither class ids nor 255; empty if there are none."""
    values = np.flatnonzero(counts).tolist()
    wrong = [value for value in values if num_classes < value != IGNORE]
    return ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
