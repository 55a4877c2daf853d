"""Build the index of a dataset: read and check every file once, and report all faults together."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config.dataset import Dataset
from pipeline.data import boxes, census
from pipeline.data.census import Census, Sight
from pipeline.data.checks import LOSSLESS, LOSSY
from pipeline.data.class_file import read_classes
from pipeline.data.faults import LIMIT, Faults, hint
from pipeline.data.inspection import HEIC, Fault, ImageFiles, Inspection, inspect, remark_files
from pipeline.data.lists import read_list
from pipeline.data.photos import SUFFIXES
from pipeline.data.tags import SHOWN, Tags, read_tags
from pipeline.data.tags.matching import Nearest
from pipeline.data.tree import check_id, files_by_id

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]  # items, label, number of items


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
class Survey:
    """The index of a dataset as ``pipeline.data.index`` reads it, and the census, which only the report may read."""

    index: dict[str, Any]
    census: Census


def build_index(
    dataset: Dataset,
    saliency: Path | None = None,
    threads: int = 1,
    progress: Progress = lambda items, label, total: items,
    announce: Callable[[str], None] = lambda line: None,
) -> Survey:
    """Check a dataset in VOC layout, decoding every file, and return its index and its census.

    Every training image needs an entry in the tags, which may be without a class. Every evaluation image needs a mask
    if ``dataset.masks`` is set. Tags and saliency maps of evaluation images are optional, but each must exist for all
    of them or for none. Images of ``dataset.extra`` are appended to the training list, sorted by class and id; each has
    the tag of its folder and no mask.

    Args:
        saliency: folder of grey pictures with the images' ids and sizes.
        threads: number of threads that decode and hash files (both release the GIL).
        announce: takes a line on the images, before they are read.

    Raises:
        PipelineError: lists all faults, one per line, with at most ``faults.LIMIT`` of each kind.
    """
    faults = Faults()
    root = Path(dataset.root)
    classes = read_classes(root, dataset.classes, faults)
    lists = {"train": root / dataset.train, "evaluation": root / dataset.evaluation}
    folder = root / dataset.images
    images = files_by_id(folder, SUFFIXES, "dataset.images", faults)
    paths = {name: files[0].relative_to(folder).as_posix() for name, files in (images or {}).items()}
    splits = {split: read_list(path, faults, paths if images else None) for split, path in lists.items()}
    evaluation = set(splits["evaluation"])
    for name in splits["train"]:
        if name in evaluation:
            line = f"{lists['train']}: {name} is also in {lists['evaluation']}; take it out of one"
            faults.add("image in both lists", line)
    ids = list(dict.fromkeys(splits["train"] + splits["evaluation"]))
    tags = _checked_tags(dataset, classes, splits, paths, faults)
    extra = _read_extra(Path(dataset.extra), classes, faults) if dataset.extra and classes else ExtraImages()
    splits["train"] += extra.files
    files_of_images = _match_files(dataset, ids, images, extra, splits, saliency, faults)
    kinds = Counter(files.image.suffix.lower() for files in files_of_images)
    shares = ", ".join(f"{number} {suffix}" for suffix, number in kinds.most_common())
    announce(f"index: {len(files_of_images)} images to read ({shares})")
    results = _inspect_all(files_of_images, len(classes), dataset, threads, progress)
    for kind, line in _joined(fault for result in results for fault in result.faults):
        faults.add(kind, line)
    counts = _count(dataset, classes, splits, {**tags.by_image, **extra.tags}, files_of_images, results, faults)
    counts = replace(counts, remarks=[*counts.remarks, *tags.remarks], source=tags.source)
    read = {files.id: result.entry for files, result in zip(files_of_images, results, strict=True)}
    true_boxes = _read_boxes(dataset, splits["evaluation"], read, tags, classes, faults)
    faults.check()
    entries = {}
    for files, result in zip(files_of_images, results, strict=True):
        entries[files.id] = {
            "file": Path(os.path.relpath(files.image, root)).as_posix(),
            "mask": files.mask and Path(os.path.relpath(files.mask, root)).as_posix(),
            "saliency": files.saliency and files.saliency.as_posix(),
            "tags": list(extra.tags.get(files.id) or tags.by_image.get(files.id, ())),
            **result.entry,
            **({"boxes": true_boxes[files.id]} if files.id in true_boxes else {}),
        }
    tag_source = tags.source
    if extra.files:
        tag_source += f"; {len(extra.files)} images with single tags: {dataset.extra}"
    source = {"root": root.as_posix(), "classes": classes, "splits": splits, "tag_source": tag_source}
    return Survey({**source, "images": entries}, counts)


def _read_boxes(
    dataset: Dataset,
    evaluation: Sequence[str],
    read: Mapping[str, dict[str, Any]],
    tags: Tags,
    classes: Sequence[str],
    faults: Faults,
) -> dict[str, list[list[float]]]:
    """Read the boxes of the evaluation images. ``read``: the entry of each image that has a file."""
    if dataset.boxes is None or not classes:
        return {}
    images = {name: read[name] for name in evaluation if name in read}
    return boxes.read_boxes(Path(dataset.root) / dataset.boxes, images, tags.by_image, len(classes), faults)


def _joined(faults: Iterable[Fault]) -> list[Fault]:
    """Faults with all photos that a missing package cannot read as one line."""
    every = list(faults)
    heic = [line for kind, line in every if kind == HEIC]
    others = [fault for fault in every if fault[0] != HEIC]
    if len(heic) > 1:
        heic = [f"{heic[0]} ({len(heic)} images)"]
    return [*((HEIC, line) for line in heic), *others]


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
    return replace(counts, remarks=[*counts.remarks, *remark_files(dataset, images, results)])


def _checked_tags(
    dataset: Dataset,
    classes: Sequence[str],
    splits: dict[str, list[str]],
    photos: dict[str, str],
    faults: Faults,
) -> Tags:
    """Read the tags of the listed images; images without an entry become faults or negatives."""
    path = Path(dataset.root) / dataset.tags
    if not classes:
        return Tags({}, path.name)
    listed = dict.fromkeys([*splits["train"], *splits["evaluation"]])
    photos = photos | {name: name for name in listed if name not in photos}
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
        stems = files_by_id(folder / name, SUFFIXES, "dataset.extra", faults, deep=False) if name in names else {}
        for stem, files in sorted((stems or {}).items()):
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
    masks = _masks(root / dataset.masks, splits, faults) if dataset.masks else {}
    maps = files_by_id(saliency, LOSSLESS, "saliency.path", faults) if saliency else None
    if images is None:
        return []
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
            faults.add("missing image", _missing_image(root / dataset.images / name))
        elif check_id(name, files, faults):
            mask = masks.get(name) if name in listed else None
            matched.append(ImageFiles(name, files[0], mask, (maps or {}).get(name, [None])[0]))
    return matched


def _masks(folder: Path, splits: dict[str, list[str]], faults: Faults) -> dict[str, Path]:
    """The mask of each listed image; evaluation images need one."""
    masks = files_by_id(folder, LOSSLESS, "dataset.masks", faults)
    if masks is None:
        return {}
    lossy = files_by_id(folder, LOSSY, "dataset.masks", Faults()) or {}
    for name in dict.fromkeys([*splits["evaluation"], *splits["train"]]):
        if files := masks.get(name):
            if len(files) > 1:
                check_id(name, files, faults)
        elif name in lossy:
            cause = "is JPEG or WebP, whose lossy compression changes class ids; save the mask as PNG"
            faults.add("lossy mask", f"{lossy[name][0]}: {cause}")
        elif name in splits["evaluation"]:
            line = f"{folder / name}.png: missing, but it is an evaluation image; add it or unlist it"
            faults.add("missing mask", line)
    return {name: files[0] for name, files in masks.items()}


def _missing_image(path: Path) -> str:
    """The line on a listed image without a file, which names a file of another format if there is one."""
    try:
        others = sorted(name for name in os.listdir(path.parent) if os.path.splitext(name)[0] == path.name)
    except OSError:
        others = []
    if others:
        kinds = ", ".join(suffix.removeprefix(".") for suffix in SUFFIXES)
        return f"{path.parent / others[0]}: is listed, but of a format that is not read ({kinds} are); convert it"
    return f"{path}.jpg (or another format): missing, but it is listed; add it or unlist it"


def _inspect_all(
    images: list[ImageFiles], num_classes: int, dataset: Dataset, threads: int, progress: Progress
) -> list[Inspection]:
    pool = ThreadPoolExecutor(threads)
    try:
        results = pool.map(partial(inspect, num_classes=num_classes, dataset=dataset), images)
        return list(progress(results, "index: images checked", len(images)))
    finally:
        pool.shutdown(cancel_futures=True)
