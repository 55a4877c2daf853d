"""``labelstudio``: pre-annotations for Label Studio, one brush region per photo and class.

labelstudio.json holds a task per photo with a prediction, whose score is the mask's mean probability.
labelstudio_config.xml is the project's labelling configuration. The photos are named as local files
(``/data/local-files/?d=PATH``), so set LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT to the folder that the paths start from.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

from pipeline.stores.files import atomic
from wsss.formats.base import Item, runs
from wsss.formats.colours import hexadecimal

_SIZES = (3, 4, 8, 16)  # bits of a run's length, less 1
_CHANNELS = 4  # of the RGBA image that the code describes


class LabelStudio:
    needs_photo = False
    needs = "mask"

    def files(self, name: str, folder: Path) -> list[Path]:
        return []

    def write(self, item: Item, folder: Path) -> dict[str, Any]:
        regions = []
        for number in item.present():
            region = {
                "id": f"class{number}",
                "type": "brushlabels",
                "from_name": "tag",
                "to_name": "image",
                "origin": "prediction",
                "original_width": item.width,
                "original_height": item.height,
                "image_rotation": 0,
                "value": {
                    "format": "rle",
                    "rle": brush_rle(item.labels == number),
                    "brushlabels": [item.classes[number]],
                },
            }
            if number in item.confidence:
                region["score"] = round(item.confidence[number], 4)
            regions.append(region)
        prediction: dict[str, Any] = {"model_version": "wsss", "result": regions}
        if item.score is not None:
            prediction["score"] = round(item.score, 4)
        return {"data": {"image": f"/data/local-files/?d={quote(item.photo)}"}, "predictions": [prediction]}

    def join(self, entries: Iterable[Any], classes: tuple[str, ...], folder: Path) -> None:
        with atomic(folder / "labelstudio.json") as temporary, temporary.open("w", encoding="utf-8") as file:
            separator = "[\n"
            for entry in entries:
                file.write(separator + json.dumps(entry, ensure_ascii=False))
                separator = ",\n"
            file.write("\n]\n" if separator == ",\n" else "[]\n")
        labels = "".join(
            f"    <Label value={quoteattr(name)} background={quoteattr(hexadecimal(number))}/>\n"
            for number, name in enumerate(classes)
            if number
        )
        brush = f'  <BrushLabels name="tag" toName="image">\n{labels}  </BrushLabels>\n'
        with atomic(folder / "labelstudio_config.xml") as temporary:
            image = '  <Image name="image" value="$image" zoom="true"/>\n'
            temporary.write_text(f"<View>\n{image}{brush}</View>\n", encoding="utf-8")


def brush_rle(mask: NDArray[np.bool_]) -> list[int]:
    """Encode a mask in Label Studio's run-length code (rle-pack of thi.ng), as a list of bytes.

    The code describes an RGBA image, whose four channels are 255 where the mask is set. It begins with the number of
    values in 32 bits, the bits of a value less 1 in 5, and the four possible bits of a run's length less 1 in 4 each.
    A run follows as a bit 1, the index of its length's bits in 2, its length less 1, and its value in 8.
    """
    lengths, values = runs(mask.reshape(-1))
    bits = [f"{mask.size * _CHANNELS:032b}", f"{8 - 1:05b}", *(f"{size - 1:04b}" for size in _SIZES)]
    longest = 1 << _SIZES[-1]
    for length, value in zip((lengths * _CHANNELS).tolist(), values.tolist(), strict=True):
        byte = "11111111" if value else "00000000"
        while length > 0:
            part = min(length, longest)
            index = next(number for number, size in enumerate(_SIZES) if part <= 1 << size)
            bits.append(f"1{index:02b}{part - 1:0{_SIZES[index]}b}{byte}")
            length -= part
    code = "".join(bits)
    code += "0" * (-len(code) % 8)
    return list(int(code, 2).to_bytes(len(code) // 8, "big"))
