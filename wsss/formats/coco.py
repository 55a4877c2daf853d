"""``coco``: instances files with one annotation per photo and class: coco_rle.json and coco_polygons.json.

Both give the mask back exactly. The polygons run along the edges of the pixels. A hole is connected to the outline by a
cut without width, since COCO's polygons have no holes. ``score`` is the confidence of the class, if known.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from pipeline.stores.files import atomic
from wsss.formats.base import Item, box
from wsss.formats.polygons import polygons

RLE, POLYGONS = "coco_rle.json", "coco_polygons.json"


class Coco:
    needs_photo = False
    needs = "mask"

    def files(self, name: str, folder: Path) -> list[Path]:
        return []

    def write(self, item: Item, folder: Path) -> dict[str, Any]:
        annotations = []
        for number in item.present():
            mask = item.labels == number
            code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            shared = {"category_id": number, "area": int(mask.sum()), "bbox": list(box(mask)), "iscrowd": 0}
            if number in item.confidence:
                shared["score"] = round(item.confidence[number], 4)
            rle = {"size": [item.height, item.width], "counts": code["counts"].decode()}
            annotations.append({**shared, "rle": rle, "polygons": polygons(mask)})
        return {"file_name": item.photo, "height": item.height, "width": item.width, "annotations": annotations}

    def join(self, entries: Iterable[Any], classes: tuple[str, ...], folder: Path) -> None:
        entries = list(entries)
        images = [
            {"id": number, **{key: entry[key] for key in ("file_name", "height", "width")}}
            for number, entry in enumerate(entries, 1)
        ]
        categories = [{"id": number, "name": name} for number, name in enumerate(classes) if number]
        for file, key in ((RLE, "rle"), (POLYGONS, "polygons")):
            content = {
                "info": {"description": "masks by wsss"},
                "licenses": [],
                "images": images,
                "categories": categories,
                "annotations": list(_annotations(entries, key)),
            }
            with atomic(folder / file) as temporary:
                temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _annotations(entries: list[Any], key: str) -> Iterator[dict[str, Any]]:
    identity = 0
    for image, entry in enumerate(entries, 1):
        for annotation in entry["annotations"]:
            identity += 1
            shared = {name: value for name, value in annotation.items() if name not in ("rle", "polygons")}
            yield {"id": identity, "image_id": image, **shared, "segmentation": annotation[key]}
