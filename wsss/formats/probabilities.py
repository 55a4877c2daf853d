"""``probabilities``: a grey PNG per photo and object class, 0 to 255 for a probability of 0 to 1.

The file is probabilities/PHOTO/ID_CLASS.png. A class whose probability rounds to 0 everywhere has none.
"""

import re
import shutil
from pathlib import Path

from wsss.formats.base import Item
from wsss.formats.png import write_png


class Probabilities:
    needs_photo = False
    needs = "levels"

    def files(self, name: str, folder: Path) -> list[Path]:
        return [folder / "probabilities" / name]

    def write(self, item: Item, folder: Path) -> None:
        target = self.files(item.name, folder)[0]
        if target.is_dir():
            shutil.rmtree(target)  # of an earlier run, whose classes may differ
        target.mkdir(parents=True)
        for number, level in item.levels.items():
            if level.any():
                write_png(target / f"{number}_{file_name(item.classes[number])}.png", level)


def file_name(text: str) -> str:
    """Replace the characters that file systems refuse, and those after the first 60."""
    return re.sub(r'[\x00-\x1f<>:"/\\|?*]', "_", text)[:60].rstrip(" .") or "_"
