"""Draws docs/strip.png, the picture in README, from results/demo.

In the repository's folder: ``python docs/strip.py ROW TRAINING_ID,... EVALUATION_ID,...``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, ".")

import wsss
from pipeline.report.pictures import PALETTE, overlay
from pipeline.stores.raster import RasterStore

RESULTS = Path("results/demo")
SIDE, GAP, HEAD, FOOT = 144, 8, 22, 20
HEADINGS = ("image and tags", "attention map", "pseudo label", "new image", "predicted mask", "true mask")


def main(row: str, images: list[str], new: list[str]) -> None:
    index = json.loads((RESULTS / "index/index.json").read_text())
    names = index["classes"]
    root = Path(index["root"])
    sheet = Image.new("RGB", (6 * (SIDE + GAP) + 2 * GAP, HEAD + len(images) * (SIDE + FOOT)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    maps, labels = RasterStore(maps_of(row)), RasterStore(RESULTS / f"pseudo_labels/{row}/labels.h5")
    model = wsss.load(RESULTS / f"predictions/{row}/model.safetensors", "cpu")

    def place(picture: Any, column: int, line: int, text: str = "") -> None:
        x, y = GAP // 2 + column * (SIDE + GAP) + (column > 2) * 2 * GAP, HEAD + line * (SIDE + FOOT)
        sheet.paste(Image.fromarray(picture), (x, y))
        draw.text((x + SIDE // 2, y + SIDE + 2), text, "black", font, anchor="ma")

    for column, heading in enumerate(HEADINGS):
        x = GAP // 2 + column * (SIDE + GAP) + (column > 2) * 2 * GAP
        draw.text((x + SIDE // 2, 3), heading, "black", font, anchor="ma")
    for line, name in enumerate(images):
        entry = index["images"][name]
        photo = enlarged(root / entry["file"])
        place(photo, 0, line, ", ".join(names[tag - 1] for tag in entry["tags"]))
        place(overlay(photo, maps.maps(name)), 1, line)
        place(coloured(labels.get(name)), 2, line)
    for line, name in enumerate(new):
        file = root / index["images"][name]["file"]
        mask = model.predict(file).mask
        place(enlarged(file), 3, line)
        large = [k for k in np.unique(mask) if k and (mask == k).mean() > 0.005]
        place(coloured(mask), 4, line, ", ".join(names[k - 1] for k in large))
        place(coloured(RasterStore(RESULTS / "ground_truth/labels.h5").get(name)), 5, line)
    sheet.quantize(192, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save("docs/strip.png", optimize=True)


def maps_of(row: str) -> Path:
    """Return the maps that the row's label rule reads."""
    from pipeline.config.params import load

    source = load([Path("params.yaml")]).pseudo_labels[row].source
    return RESULTS / source / "maps.h5"


def enlarged(file: Path) -> Any:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def coloured(mask: Any) -> Any:
    return np.asarray(Image.fromarray(PALETTE[mask]).resize((SIDE, SIDE), Image.Resampling.NEAREST))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(","), sys.argv[3].split(","))
