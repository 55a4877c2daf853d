"""From a dataset's folder to its index: everything is read and checked once, and every fault reported at once."""

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.schema import Dataset
from pipeline.data.checks import IGNORE, InvalidFile, image_size, mask_values, saliency_values
from pipeline.data.faults import Faults, hint
from pipeline.data.tags import IMAGE_SUFFIXES, Tags, read_list, read_tags
from pipeline.data.voc import CLASSES
from pipeline.stores.raster import Raster

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]  # items, label, number of items
Fault = tuple[str, str]  # kind, line


@dataclass(frozen=True)
class Files:
    """The files of one image; all paths as the process sees them."""

    id: str
    image: Path
    mask: Path | None
    saliency: Path | None


@dataclass(frozen=True)
class Extra:
    """The images of ``dataset.extra`` by image id: their files, of which there must be one, and their tag."""

    files: dict[str, list[Path]] = field(default_factory=dict)
    tags: dict[str, tuple[int, ...]] = field(default_factory=dict)


def build_index(
    dataset: Dataset,
    saliency: Path | None = None,
    threads: int = 1,
    progress: Progress = lambda items, label, total: items,
) -> dict[str, Any]:
    """Check a dataset in VOC layout, every file in full, and describe it as ``pipeline.data.index`` reads it.

    A training image needs tags, an evaluation image a mask (where ``dataset.masks`` is given). Evaluation images may
    have no tags or saliency maps, as in the field's own files, but then none of them may. Images of ``dataset.extra``
    follow the training list's by class and id, each with its folder's tag and without a mask.

    Args:
        saliency: folder of grey PNG with the images' stems and sizes.
        threads: decoding and hashing run outside the interpreter's lock.

    Raises:
        PipelineError: with every fault found, a line each; of one kind at most ``faults.LIMIT``.
    """
    faults = Faults()
    root = Path(dataset.root)
    classes = read_classes(root, dataset.classes, faults)
    lists = {"train": root / dataset.train, "evaluation": root / dataset.evaluation}
    splits = {split: read_list(path, faults) for split, path in lists.items()}
    evaluation = set(splits["evaluation"])
    for name in splits["train"]:
        if name in evaluation:
            line = f"{lists['train']}: {name} is also in {lists['evaluation']}; take it out of one"
            faults.add("image in both lists", line)
    ids = list(dict.fromkeys(splits["train"] + splits["evaluation"]))
    tags = _tags(root / dataset.tags, classes, splits, faults)
    extra = _read_extra(Path(dataset.extra), classes, faults) if dataset.extra and classes else Extra()
    splits["train"] += extra.files
    found = _find(dataset, ids, extra, splits, saliency, faults)
    results = _inspect_all(found, len(classes), threads, progress)
    for _, image_faults in results:
        for kind, line in image_faults:
            faults.add(kind, line)
    faults.check()
    images = {}
    for files, (entry, _) in zip(found, results, strict=True):
        images[files.id] = {
            "file": Path(os.path.relpath(files.image, root)).as_posix(),
            "mask": files.mask and files.mask.relative_to(root).as_posix(),
            "saliency": files.saliency and files.saliency.as_posix(),
            "tags": list(extra.tags.get(files.id) or tags.of.get(files.id, ())),
            **entry,
        }
    told = f"{tags.source}; {len(extra.files)} images with single tags: {dataset.extra}" if extra.files else tags.source
    source = {"root": root.as_posix(), "classes": classes, "splits": splits, "tag_source": told}
    return {**source, "images": images}


def read_classes(root: Path, classes: str, faults: Faults) -> list[str]:
    """Names of the classes 1..K: VOC's, or those of a text file with one name a line."""
    if classes == "voc":
        return list(CLASSES)
    path = root / classes
    try:
        names = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        faults.add("classes", f"{path}: cannot be read ({error}); write one class name a line, or set dataset.classes")
        return []
    if not 0 < len(names) < IGNORE:
        faults.add("classes", f"{path}: names {len(names)} classes; there must be 1 to {IGNORE - 1}, one a line")
    if len(set(names)) < len(names):
        twice = ", ".join(sorted({name for name in names if names.count(name) > 1}))
        faults.add("classes", f"{path}: names {twice} twice; remove one")
    if "background" in names:
        faults.add("classes", f"{path}: names background, which is class 0 of itself; list the objects alone")
    return names


def _tags(path: Path, classes: Sequence[str], splits: dict[str, list[str]], faults: Faults) -> Tags:
    if not classes:
        return Tags({}, path.name)
    known = len(faults)
    tags = read_tags(path, classes, [*splits["train"], *splits["evaluation"]], faults)
    if not tags.of and len(faults) == known:
        faults.add("tag file", f"{path}: tags no listed image; correct dataset.tags, or tag the images")
    if tags.of:
        for name in _lacking(splits, tags.of):
            faults.add("image not in the tags", f"{path}: has no entry for {name}; tag it or unlist it")
        for name in splits["train"]:
            if tags.of.get(name) == ():
                faults.add("image without tags", f"{path}: training image {name} has no tag; tag it or unlist it")
    return tags


def _read_extra(folder: Path, classes: Sequence[str], faults: Faults) -> Extra:
    """The images right in the folders that are named like the classes, by class id and image id."""
    known = len(faults)
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        faults.add("folder", f"{folder}: cannot be listed ({error.strerror}); create it or correct dataset.extra")
        return Extra()
    for name in names:
        if name not in classes:
            mend = hint(name, classes, "rename or remove it")
            faults.add("extra folder", f"{folder / name}: is named like none of dataset.classes; {mend}")
    extra = Extra()
    for class_id, name in enumerate(classes, 1):
        stems = _stems(folder / name, IMAGE_SUFFIXES, "dataset.extra", faults) if name in names else {}
        for stem, files in sorted((stems or {}).items()):
            if not stem.startswith("."):
                extra.files.setdefault(stem, []).extend(files)
                extra.tags.setdefault(stem, (class_id,))
    if not extra.files and len(faults) == known:
        line = f"{folder}: holds no image in a folder of a class, such as {folder / classes[0]}; add some"
        faults.add("extra folder", f"{line}, or set dataset.extra to null")
    return extra


def _lacking(splits: dict[str, list[str]], there: Collection[str]) -> list[str]:
    """Listed images that lack something which every training image needs, and either all evaluation images or none."""
    needed = list(splits["train"])
    if any(name in there for name in splits["evaluation"]):
        needed += splits["evaluation"]
    return [name for name in dict.fromkeys(needed) if name not in there]


def _find(
    dataset: Dataset,
    ids: Sequence[str],
    extra: Extra,
    splits: dict[str, list[str]],
    saliency: Path | None,
    faults: Faults,
) -> list[Files]:
    """Which files the images have, listed and extra ones; what is missing or ambiguous is at fault and left out."""
    root = Path(dataset.root)
    images = _stems(root / dataset.images, IMAGE_SUFFIXES, "dataset.images", faults)
    masks = _stems(root / dataset.masks, (".png",), "dataset.masks", faults) if dataset.masks else None
    maps = _stems(saliency, (".png",), "saliency.path", faults) if saliency else None
    if images is None:
        return []
    if dataset.masks and masks is not None:
        for name in splits["evaluation"]:
            if name not in masks:
                line = f"{root / dataset.masks / name}.png: missing, though an evaluation image; add it or unlist it"
                faults.add("missing mask", line)
    if saliency and maps is not None:
        for name in _lacking(splits, maps):
            line = f"{saliency / name}.png: missing; add it, or choose another saliency.kind"
            faults.add("missing saliency map", line)
    found = []
    listed = set(ids)
    for name in dict.fromkeys([*ids, *extra.files]):
        own = images.get(name, []) if name in listed else []
        files = own + extra.files.get(name, [])
        if name in listed and not own:
            line = f"{root / dataset.images / name}.jpg (or .png): missing, though listed; add it or unlist it"
            faults.add("missing image", line)
        elif len(files) > 1:
            line = f"{files[0]}: {files[1]} has the same stem; remove or rename one of the two"
            faults.add("two images of one stem", line)
        else:
            mask, saliency_map = ((stems or {}).get(name, [None])[0] for stems in (masks, maps))
            found.append(Files(name, files[0], mask if name in listed else None, saliency_map))
    return found


def _stems(folder: Path, suffixes: tuple[str, ...], key: str, faults: Faults) -> dict[str, list[Path]] | None:
    """The folder's files by stem, or None where there is no such folder."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        faults.add("folder", f"{folder}: cannot be listed ({error.strerror}); create it or correct {key}")
        return None
    stems: dict[str, list[Path]] = {}
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in suffixes:
            stems.setdefault(stem, []).append(folder / name)
    return stems


def _inspect_all(
    found: list[Files], num_classes: int, threads: int, progress: Progress
) -> list[tuple[dict[str, Any], list[Fault]]]:
    pool = ThreadPoolExecutor(threads)
    try:
        results = pool.map(partial(_inspect, num_classes=num_classes), found)
        return list(progress(results, "index: images checked", len(found)))
    finally:
        pool.shutdown(cancel_futures=True)


def _inspect(files: Files, num_classes: int) -> tuple[dict[str, Any], list[Fault]]:
    """Size and hashes of one image and what belongs to it, and their faults."""
    entry: dict[str, Any] = {}
    faults: list[Fault] = []

    def read(path: Path | None, kind: str, key: str, decode: Callable[[bytes], Any]) -> Any:
        entry[key] = None
        try:
            if path is not None:
                data = path.read_bytes()
                entry[key] = hashlib.sha256(data).hexdigest()
                return decode(data)
        except InvalidFile as error:
            faults.append((kind, f"{path}: {error}"))
        except OSError as error:
            faults.append((kind, f"{path}: cannot be read ({error.strerror}); mend its permissions or the disk"))
        return None

    size: tuple[int, int] | None = read(files.image, "unreadable image", "sha256", image_size)
    if size is not None:
        entry["height"], entry["width"] = size
    mask: Raster | None = read(files.mask, "unreadable mask", "mask_sha256", mask_values)
    saliency: Raster | None = read(files.saliency, "unreadable saliency map", "saliency_sha256", saliency_values)
    for path, raster, what in ((files.mask, mask, "mask"), (files.saliency, saliency, "saliency map")):
        if raster is not None and size is not None and raster.shape != size:
            sizes = f"is {raster.shape[1]}x{raster.shape[0]}, its image {size[1]}x{size[0]}"
            faults.append((f"size of a {what}", f"{path}: {sizes}; make them equal"))
    wrong = _wrong_values(mask, num_classes) if mask is not None and num_classes else ""
    if wrong:
        line = f"{files.mask}: has the values {wrong}, but class ids are 0..{num_classes} and {IGNORE} (ignore)"
        faults.append(("value of a mask", f"{line}; correct it, or dataset.classes"))
    return entry, faults


def _wrong_values(mask: Raster, num_classes: int) -> str:
    """Values in the mask that are no class id, in words; empty where there is none."""
    values = np.flatnonzero(np.bincount(mask.reshape(-1), minlength=256)).tolist()
    wrong = [value for value in values if num_classes < value != IGNORE]
    return ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
