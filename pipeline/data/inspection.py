"""Reading and checking of the files of one image: the photo, its mask and its saliency map."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.dataset import Dataset
from pipeline.data.census import SHOWN
from pipeline.data.checks import IGNORE, mask_values, saliency_values
from pipeline.data.complete import InvalidFile, TooLarge
from pipeline.data.duplicates import Fingerprint, fingerprint
from pipeline.data.images import working_size
from pipeline.data.photos import HeicSupport, Photo, examine
from pipeline.stores.files import read_regular
from pipeline.stores.raster import Raster

Fault = tuple[str, str]  # kind, line
HEIC = "HEIC image"  # the kind of faults that a missing package causes
_NOTES = {
    "turned": "{} are turned upright by their EXIF orientation; their masks must fit the picture as it is shown",
    "deep": "{} have 16 bits a channel; the top 8 of the bits that the largest value of each needs are read",
    "several": "{} hold several pictures, of which the first is read",
    "named": "{} have another format than their names say",
}
_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "HEIF": (".heic", ".heif"),
}


@dataclass(frozen=True)
class ImageFiles:
    """The files of one image; paths are relative to the working directory unless absolute."""

    id: str
    image: Path
    mask: Path | None
    saliency: Path | None


@dataclass(frozen=True)
class Inspection:
    """Results of reading the files of one image: its index entry, its faults, and its content for the census.

    ``notes`` are properties of its file that a remark counts, such as an orientation.
    """

    entry: dict[str, Any]
    faults: list[Fault]
    print: Fingerprint | None
    mask: NDArray[np.intp] | None
    notes: tuple[str, ...] = ()


def inspect(files: ImageFiles, num_classes: int, dataset: Dataset) -> Inspection:
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
        except TooLarge as error:
            faults.append((kind, f"{path}: {error} or raise dataset.max_megapixels"))
        except InvalidFile as error:
            faults.append((HEIC if isinstance(error, HeicSupport) else kind, f"{path}: {error}"))
        except OSError as error:
            faults.append((kind, f"{path}: cannot be read ({error.strerror}); fix its permissions or the disk"))
        return None

    photo: Photo | None = read(files.image, "unreadable image", "sha256", examine)
    size = None if photo is None else photo.rgb.shape[:2]
    if size is not None:
        entry["height"], entry["width"] = working_size(size, dataset.working_megapixels)
        if (entry["height"], entry["width"]) != size:
            entry["file_size"] = list(size)
    mask: Raster | None = read(files.mask, "unreadable mask", "mask_sha256", mask_values)
    saliency: Raster | None = read(files.saliency, "unreadable saliency map", "saliency_sha256", saliency_values)
    for path, raster, name in ((files.mask, mask, "mask"), (files.saliency, saliency, "saliency map")):
        if raster is not None and photo is not None and raster.shape != size:
            faults.append((f"size of a {name}", f"{path}: {_wrong_size(raster.shape, photo, name)}"))
    counts = None if mask is None else np.bincount(mask.reshape(-1), minlength=256)
    wrong = _wrong_values(counts, num_classes) if counts is not None and num_classes else ""
    if wrong:
        line = f"{files.mask}: has the values {wrong}, but class ids are 0..{num_classes} and {IGNORE} (ignore)"
        faults.append(("value of a mask", f"{line}; correct it, or dataset.classes"))
    if photo is None:
        return Inspection(entry, faults, None, counts)
    return Inspection(entry, faults, fingerprint(photo.rgb), counts, _notes(files.image, photo))


def _wrong_size(shape: tuple[int, ...], photo: Photo, name: str) -> str:
    """What is wrong with a mask or saliency map whose size is not that of its photo, and the fix."""
    height, width = photo.rgb.shape[:2]
    line = f"is {shape[1]}x{shape[0]}, but its image is {width}x{height}"
    if shape == photo.stored_size:
        turned = f"as its EXIF orientation {photo.orientation} turns it"
        return f"{line} {turned}; the {name} fits the photo as it is stored, so turn the {name} as the photo is shown"
    return f"{line}; make them equal"


def _notes(path: Path, photo: Photo) -> tuple[str, ...]:
    """The keys of ``_NOTES`` that hold for a photo."""
    suffix = path.suffix.lower()
    holds = {
        "turned": photo.orientation != 1,
        "deep": photo.deep,
        "several": photo.frames > 1,
        "named": suffix not in _FORMATS.get(photo.form, (suffix,)),
    }
    return tuple(note for note, held in holds.items() if held)


def _wrong_values(counts: NDArray[np.intp], num_classes: int) -> str:
    """Format up to five mask values that are neither class ids nor 255; empty if there are none."""
    values = np.flatnonzero(counts).tolist()
    wrong = [value for value in values if num_classes < value != IGNORE]
    return ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")


def remark_files(dataset: Dataset, images: Sequence[ImageFiles], results: Sequence[Inspection]) -> list[str]:
    """Lines on properties of image files that are worth a look."""
    remarks = []
    large = sum("file_size" in result.entry for result in results)
    if large:
        reduced = f"{large} images are larger than dataset.working_megapixels and are reduced to "
        reduced += f"{dataset.working_megapixels:g} megapixels, with their masks; labels and scores are at that size"
        remarks.append(reduced)
    for note, text in _NOTES.items():
        names = [files.id for files, result in zip(images, results, strict=True) if note in result.notes]
        if names:
            some = ", ".join(names[:SHOWN])
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            remarks.append(f"{text.format(f'{len(names)} images')}: {some}{more}")
    return remarks
