"""``cvat``: a file of CVAT's format 'CVAT for images 1.1' with one mask per photo and class: cvat.xml.

To import it into CVAT, create a task with the same photos and labels, then choose 'Upload annotations' and this format.
A mask's ``rle`` holds the lengths of the runs of its bounding box, row by row, beginning with pixels that are not set.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from pipeline.stores.files import atomic
from wsss.formats.base import Item, box, runs
from wsss.formats.colours import hexadecimal


class Cvat:
    needs_photo = False
    needs = "mask"

    def files(self, name: str, folder: Path) -> list[Path]:
        return []

    def write(self, item: Item, folder: Path) -> dict[str, Any]:
        masks = []
        for number in item.present():
            mask = item.labels == number
            left, top, width, height = box(mask)
            lengths, values = runs(mask[top : top + height, left : left + width].reshape(-1))
            counts = lengths.tolist() if not values[0] else [0, *lengths.tolist()]
            masks.append({"class": number, "left": left, "top": top, "width": width, "height": height, "rle": counts})
        return {"photo": item.photo, "height": item.height, "width": item.width, "masks": masks}

    def join(self, entries: Iterable[Any], classes: tuple[str, ...], folder: Path) -> None:
        with atomic(folder / "cvat.xml") as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n')
            file.write("<meta><task><labels>\n")
            for number, name in enumerate(classes):
                if number:
                    parts = f"<name>{escape(name)}</name><color>{hexadecimal(number)}</color><type>mask</type>"
                    file.write(f"<label>{parts}<attributes></attributes></label>\n")
            file.write("</labels></task></meta>\n")
            for number, entry in enumerate(entries):
                size = f'width="{entry["width"]}" height="{entry["height"]}"'
                file.write(f'<image id="{number}" name={quoteattr(entry["photo"])} {size}>\n')
                for mask in entry["masks"]:
                    place = " ".join(f'{key}="{mask[key]}"' for key in ("left", "top", "width", "height"))
                    rle = ", ".join(map(str, mask["rle"]))
                    label = quoteattr(classes[mask["class"]])
                    file.write(
                        f'<mask label={label} source="auto" occluded="0" rle="{rle}" {place} z_order="0"></mask>\n'
                    )
                file.write("</image>\n")
            file.write("</annotations>\n")
