"""``csv``: a row per photo and class of its mask, with the class's pixels, share of the photo and confidence.

The file is summary.csv, UTF-8 with a byte order mark, so that spreadsheets read names in any script. A photo without an
object has the row of its background. The confidence is empty where masks come without probabilities.
"""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.stores.files import atomic
from wsss.formats.base import IGNORE, Item

HEADER = ("photo", "class", "pixels", "share", "confidence")


class Csv:
    needs_photo = False
    needs = "mask"

    def files(self, name: str, folder: Path) -> list[Path]:
        return []

    def write(self, item: Item, folder: Path) -> list[list[Any]]:
        counts = np.bincount(item.labels.reshape(-1), minlength=1)
        rows = []
        for number in counts.nonzero()[0]:
            name = "unlabelled" if number == IGNORE else item.classes[number]
            confidence = item.confidence.get(int(number))
            share = round(int(counts[number]) / item.labels.size, 6)
            rows.append(
                [item.photo, name, int(counts[number]), share, "" if confidence is None else round(confidence, 4)]
            )
        return rows

    def join(self, entries: Iterable[Any], classes: tuple[str, ...], folder: Path) -> None:
        with (
            atomic(folder / "summary.csv") as temporary,
            temporary.open("w", encoding="utf-8-sig", newline="") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(HEADER)
            for rows in entries:
                writer.writerows(rows)
