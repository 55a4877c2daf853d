"""The parts of an index. A job depends on its part only, so that other images or masks do not make it stale."""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

_MASK, _SALIENCY = ("mask", "mask_sha256"), ("saliency", "saliency_sha256")
_BOXES = "boxes"


def parts(raw: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the parts of an index, each with the stem of its file.

    * ``index``: all images. Masks and saliency maps are left out here and in ``train``, since they reach other stages
      through the ground truth and the saliency stage. So are boxes, except in ``true_boxes``.
    * ``train``: the training images.
    * ``saliency``: the training images with their saliency maps.
    * ``masks``: the images that have a mask, with it.
    * ``true_boxes``: the evaluation images that have boxes (``dataset.boxes``), with these.
    """
    splits = raw["splits"]
    training = {"train": splits["train"], "evaluation": []}
    masked = {split: [name for name in names if raw["images"][name]["mask"]] for split, names in splits.items()}
    boxed = {"train": [], "evaluation": [name for name in splits["evaluation"] if raw["images"][name].get(_BOXES)]}
    yield "index", _part(raw, splits, (*_MASK, *_SALIENCY)) | {"tag_source": raw["tag_source"]}
    yield "train", _part(raw, training, (*_MASK, *_SALIENCY))
    yield "saliency", _part(raw, training, _MASK)
    yield "masks", _part(raw, masked, _SALIENCY)
    yield "true_boxes", _part(raw, boxed, (*_MASK, *_SALIENCY), boxes=True)


def _part(
    raw: Mapping[str, Any], splits: Mapping[str, list[str]], hidden: tuple[str, ...], boxes: bool = False
) -> dict[str, Any]:
    listed, without = set(chain(*splits.values())), dict.fromkeys(hidden)
    images = {name: {**entry, **without} for name, entry in raw["images"].items() if name in listed}
    if not boxes:
        for entry in images.values():
            entry.pop(_BOXES, None)
    return {"root": raw["root"], "classes": raw["classes"], "splits": splits, "images": images}
