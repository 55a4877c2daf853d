"""The gallery of all photos with a mask: its pictures, which lie beside the report, and the data of the page's script.

A photo's doubt is the number of classes in which its mask contradicts its tags, plus the uncertainty of its network. On
220 VOC images that a network had not seen, this order agreed best with the mean IoU of the single images (Spearman's
rank correlation 0.86; uncertainty alone: 0.38; contradictions alone: 0.80).
"""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.images import read_rgb
from pipeline.data.index import Image, Index
from pipeline.errors import PipelineError
from pipeline.report.gallery import Chip, chip, holds
from pipeline.report.pictures import PALETTE, Pixels
from pipeline.stores.files import sha256
from pipeline.stores.raster import RasterStore

LARGE, THUMB = 1024, 288  # long sides of the pictures, in pixels
QUALITY = 84  # of the JPEG files
FILL = 200  # opacity of a mask's areas; their outlines have 255
MISSED = 0.002  # a tagged class with a smaller share of the pixels counts as missing from the mask
UNTAGGED = 0.01  # a class without a tag counts as one only above this share
HASHES = "pictures.json"  # the list of the pictures' hashes
AHEAD = 64  # photos that are drawn while the first of them is awaited


@dataclass(frozen=True)
class Source:
    """A photo, its mask and what is known of the mask. ``doubt`` has its doubt map if there is one."""

    image: Image
    split: str
    kind: str  # 'prediction' or 'pseudo label'
    masks: RasterStore
    doubt: RasterStore | None

    @property
    def has_tags(self) -> bool:
        """Whether the tags are known. An evaluation image without tags may have any classes."""
        return bool(self.image.tags) or self.split == "train"


@dataclass(frozen=True)
class Photo:
    """A photo of the gallery: names of its pictures, without suffix, and what its mask holds.

    ``shares`` maps the mask's classes to their share of the pixels. ``uncertainty`` is the mean of the doubt map.
    """

    source: Source
    photo: str
    mask: str
    doubt: str | None
    shares: dict[int, float]
    uncertainty: float | None

    @property
    def missing(self) -> list[int]:
        """Tagged classes that the mask lacks."""
        return [tag for tag in self.source.image.tags if self.shares.get(tag, 0) < MISSED]

    @property
    def untagged(self) -> list[int]:
        """Classes of the mask that are not tags."""
        if not self.source.has_tags:
            return []
        return [k for k, share in self.shares.items() if k not in self.source.image.tags and share >= UNTAGGED]


@dataclass(frozen=True)
class PhotoGallery:
    """All photos. ``folder`` is the name of the folder that holds the pictures, beside the page."""

    folder: str
    names: Sequence[str]  # by class id, background first
    photos: Sequence[Photo]
    row: str

    @property
    def contradicted(self) -> int:
        """The number of photos whose mask contradicts their tags."""
        return sum(bool(photo.missing or photo.untagged) for photo in self.photos)

    @property
    def classes(self) -> list[tuple[int, Chip, int]]:
        """Id, name and colour of each class that occurs, with the number of photos tagged with it or showing it."""
        counts = [0] * len(self.names)
        for photo in self.photos:
            for class_id in {*photo.source.image.tags, *photo.shares}:
                counts[class_id] += 1
        return [(k, chip(k, self.names[k]), counts[k]) for k in range(1, len(counts)) if counts[k]]

    def count(self, kind: str) -> int:
        """The number of photos whose mask is of this kind."""
        return sum(photo.source.kind == kind for photo in self.photos)

    @property
    def data(self) -> dict[str, Any]:
        """The columns that photos.js reads, with an entry for each photo. Shares are in thousandths."""
        photos = self.photos
        return {
            "folder": self.folder,
            "classes": {k: [entry.name, entry.colour] for k, entry, _ in self.classes},
            "id": [photo.source.image.id for photo in photos],
            "width": [photo.source.image.width for photo in photos],
            "height": [photo.source.image.height for photo in photos],
            "photo": [photo.photo for photo in photos],
            "mask": [photo.mask for photo in photos],
            "doubt": [photo.doubt for photo in photos],
            "train": [int(photo.source.split == "train") for photo in photos],
            "label": [int(photo.source.kind != "prediction") for photo in photos],
            "tags": [list(photo.source.image.tags) if photo.source.has_tags else None for photo in photos],
            "shares": [[[k, round(1000 * share, 1)] for k, share in photo.shares.items()] for photo in photos],
            "missing": [photo.missing for photo in photos],
            "untagged": [photo.untagged for photo in photos],
            "uncertainty": [None if p.uncertainty is None else round(1000 * p.uncertainty, 1) for p in photos],
        }


def sources(
    index: Index, predictions: RasterStore, doubt: RasterStore | None, labels: RasterStore | None
) -> list[Source]:
    """The photos that have a mask: a prediction of the network or, for lack of it, a pseudo label."""
    found = []
    for split in ("evaluation", "train"):
        for image in index.images(split):
            if holds(predictions, image.id):
                known = doubt if doubt is not None and holds(doubt, image.id) else None
                found.append(Source(image, split, "prediction", predictions, known))
            elif labels is not None and holds(labels, image.id):
                found.append(Source(image, split, "pseudo label", labels, None))
    return found


class Pictures:
    """Writes the pictures of photos to a folder.

    The names of pictures are hashes of what they show and of the code that draws them, so that equal ones are drawn
    once and a later report takes over those of the last. A list of their hashes shows which of them are intact.

    Args:
        folder: is created; one that exists is removed.
        last: the folder of the last report, if there is one.
        code: hash of the code that draws.
    """

    def __init__(self, folder: Path, last: Path, code: str) -> None:
        self._folder, self._last, self._code = folder, last, code
        self._hashes: dict[str, str] = {}  # of the pictures
        self._last_hashes = _read_hashes(last / HASHES)
        shutil.rmtree(folder, ignore_errors=True)
        for kind in ("photos", "thumbs", "masks", "doubt"):
            (folder / kind).mkdir(parents=True)

    def draw_all(
        self, found: Sequence[Source], threads: int, progress: Callable[[Sequence[Source]], Any] = iter
    ) -> list[Photo]:
        """Draw the pictures of all photos in ``threads`` threads.

        Raises:
            PipelineError: a photo cannot be read or differs from the one that was indexed; or a store is damaged.
        """
        pool = ThreadPoolExecutor(threads)
        try:
            photos = list(self._drawn(found, pool, progress))
        finally:
            pool.shutdown(cancel_futures=True)
        (self._folder / HASHES).write_text(json.dumps(self._hashes, indent=0, sort_keys=True) + "\n")
        return photos

    def _drawn(
        self, found: Sequence[Source], pool: ThreadPoolExecutor, progress: Callable[[Sequence[Source]], Any]
    ) -> Iterator[Photo]:
        waiting = deque(pool.submit(self._draw, source) for source in found[:AHEAD])
        for number, _ in enumerate(progress(found)):
            yield waiting.popleft().result()
            if number + AHEAD < len(found):
                waiting.append(pool.submit(self._draw, found[number + AHEAD]))

    def _draw(self, source: Source) -> Photo:
        image = source.image
        labels = source.masks.get(image.id)
        level = source.doubt.get(image.id) if source.doubt else None
        content = image.sha256 or sha256(image.file)
        photo, mask = self._name(content, str(image.size)), self._name(labels)
        large, thumb = self._folder / f"photos/{photo}.jpg", self._folder / f"thumbs/{photo}.jpg"
        if not (self._take(large) and self._take(thumb)):
            rgb = _within(read_rgb(image), LARGE, cv2.INTER_AREA)
            options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
            self._write(large, rgb[..., ::-1], options)
            self._write(thumb, _within(rgb, THUMB, cv2.INTER_AREA)[..., ::-1], options)
        if not self._take(file := self._folder / f"masks/{mask}.png"):
            self._write(file, draw_mask(labels), [cv2.IMWRITE_PNG_COMPRESSION, 6])
        doubt = None
        if level is not None:
            doubt = self._name(level)
            if not self._take(file := self._folder / f"doubt/{doubt}.png"):
                self._write(file, draw_doubt(level), [cv2.IMWRITE_PNG_COMPRESSION, 6])
        counts = np.bincount(labels.ravel(), minlength=256) / max(1, labels.size)
        shares = {int(k): float(counts[k]) for k in np.flatnonzero(counts) if 0 < k < 255}
        return Photo(source, photo, mask, doubt, shares, None if level is None else float(level.mean()) / 255)

    def _name(self, content: str | Pixels, more: str = "") -> str:
        digest = hashlib.sha256(f"{self._code} {more} ".encode())
        if isinstance(content, str):
            digest.update(content.encode())
        else:
            digest.update(str(content.shape).encode())
            digest.update(content.tobytes())
        return digest.hexdigest()[:16]

    def _take(self, path: Path) -> bool:
        """Take the picture over from the last report, if it is intact there. Return whether it is there now."""
        name = path.relative_to(self._folder).as_posix()
        if name in self._hashes:  # of an equal photo
            return True
        old, known = self._last / name, self._last_hashes.get(name)
        if known is None or not old.is_file() or sha256(old) != known:
            return False
        try:
            os.link(old, path)
        except FileExistsError:
            pass  # an equal photo was faster
        except OSError:  # a file system without hard links
            shutil.copyfile(old, path)
        self._hashes[name] = known
        return True

    def _write(self, path: Path, pixels: NDArray[np.uint8], options: Sequence[int]) -> None:
        done, encoded = cv2.imencode(path.suffix, np.ascontiguousarray(pixels), options)
        if not done:
            raise PipelineError(f"{path}: a picture of shape {pixels.shape} cannot be encoded")
        content = encoded.tobytes()
        path.unlink(missing_ok=True)  # it may be a hard link to a picture of the last report
        path.write_bytes(content)
        self._hashes[path.relative_to(self._folder).as_posix()] = hashlib.sha256(content).hexdigest()


def _read_hashes(path: Path) -> dict[str, str]:
    """The hashes of a folder's pictures by name; empty if the file is missing or damaged."""
    try:
        hashes = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return hashes if isinstance(hashes, dict) else {}


def draw_mask(labels: Pixels) -> NDArray[np.uint8]:
    """Draw a label map as a BGRA picture: areas in the palette's colours with a white outline on the background.

    The background is transparent. Ignored pixels are paler than the areas.
    """
    labels = _within(labels, LARGE, cv2.INTER_NEAREST)
    area = ((labels > 0) & (labels < 255)).astype(np.uint8)
    width = 2 * max(1, round(max(labels.shape) / 400)) + 1
    outline = (cv2.dilate(area, np.ones((width, width), np.uint8)) > 0) & (area == 0)
    alpha = np.where(outline, 255, np.where(area, FILL, 0)).astype(np.uint8)
    alpha[(labels == 255) & ~outline] = FILL // 2
    colours = PALETTE[labels][..., ::-1] * (labels > 0)[..., None]
    colours[outline] = 255
    return np.dstack([colours, alpha])


def draw_doubt(level: Pixels) -> NDArray[np.uint8]:
    """Draw a doubt map as a BGRA picture: yellow, and the more opaque the larger the doubt."""
    alpha = np.minimum(255, level.astype(np.int32) * 3 // 2).astype(np.uint8)
    return np.dstack([np.full((*level.shape, 3), (0, 220, 255), np.uint8), alpha])


def _within(pixels: Pixels, side: int, interpolation: int) -> Pixels:
    """Reduce to a long side of at most ``side``."""
    factor = side / max(pixels.shape[:2])
    if factor >= 1:
        return pixels
    size = max(1, round(pixels.shape[1] * factor)), max(1, round(pixels.shape[0] * factor))
    return np.asarray(cv2.resize(pixels, size, interpolation=interpolation), np.uint8)
