"""The index: the checked description of a dataset that all later stages read."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError


@dataclass(frozen=True)
class Image:
    """One image. ``tags`` are sorted class ids in 1..K; empty if an evaluation image's tags are unknown.

    All stages work at ``height`` x ``width``. If its file is larger than ``dataset.working_megapixels``, ``file_size``
    is the file's (height, width), and whatever is read from files is reduced. Only the ground-truth stage may read
    ``mask``.
    """

    id: str
    file: Path
    height: int
    width: int
    tags: tuple[int, ...]
    mask: Path | None
    saliency: Path | None
    sha256: str | None = None  # of the image file
    mask_sha256: str | None = None
    saliency_sha256: str | None = None
    file_size: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """The working (height, width)."""
        return self.height, self.width

    @property
    def file_pixels(self) -> int:
        """The number of pixels of the file."""
        height, width = self.file_size or self.size
        return height * width


class Index:
    """Images by id, the two splits, and the class names (class id k is ``classes[k - 1]``).

    Raises:
        PipelineError: the file cannot be read or is not JSON.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._parse(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise PipelineError(f"{path}: not an index ({error!r:.200}); run the index stage again") from error

    def _parse(self, raw: dict[str, Any]) -> None:
        self.classes: list[str] = raw["classes"]
        self.tag_source: str = raw.get("tag_source", "")  # train.json has none
        self.splits: dict[str, list[str]] = {split: raw["splits"][split] for split in ("train", "evaluation")}
        root = Path(raw["root"])
        self._images = {
            name: Image(
                name,
                _below(root, entry["file"]),
                entry["height"],
                entry["width"],
                tuple(entry["tags"]),
                _below(root, entry["mask"]) if entry["mask"] else None,
                Path(entry["saliency"]) if entry["saliency"] else None,
                entry.get("sha256"),
                entry.get("mask_sha256"),
                entry.get("saliency_sha256"),
                tuple(entry["file_size"]) if "file_size" in entry else None,
            )
            for name, entry in raw["images"].items()
        }
        for ids in self.splits.values():
            if unknown := set(ids) - self._images.keys():
                raise ValueError(f"no entry for {sorted(unknown)[0]}")

    def __getitem__(self, image_id: str) -> Image:
        return self._images[image_id]

    def __len__(self) -> int:
        return len(self._images)

    def images(self, split: str | None = None) -> list[Image]:
        """Images of the split ``train`` or ``evaluation`` in list order, or all images if ``split`` is None."""
        return list(self._images.values()) if split is None else [self._images[name] for name in self.splits[split]]

    @property
    def num_classes(self) -> int:
        """K, without background."""
        return len(self.classes)


def _below(root: Path, path: str) -> Path:
    """Resolve '..' of files outside of ``root`` lexically, as they were indexed, even if ``root`` is a symlink."""
    return Path(os.path.normpath(root / path))


def training_part(raw: dict[str, Any], maps: bool = False) -> dict[str, Any]:
    """The part of an index that trainings depend on: the training images without their masks and saliency maps.

    The masks reach a training through the ground truth, the maps through the pseudo labels.

    Args:
        maps: keep the saliency maps.
    """
    training = raw["splits"]["train"]
    hidden = dict.fromkeys(("mask", "mask_sha256") if maps else ("mask", "mask_sha256", "saliency", "saliency_sha256"))
    images = {name: {**raw["images"][name], **hidden} for name in training}
    splits = {"train": training, "evaluation": []}
    return {"root": raw["root"], "classes": raw["classes"], "splits": splits, "images": images}
