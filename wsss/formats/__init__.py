"""Output formats, one file each. ``FORMATS`` lists them by name; ``base.py`` defines what a format is.

A format that people's tools cannot tell from the others by itself is described in docs/LIBRARY.md.
"""

from wsss.formats.base import Collected, Format, Item
from wsss.formats.coco import Coco
from wsss.formats.csv import Csv
from wsss.formats.cvat import Cvat
from wsss.formats.labelstudio import LabelStudio
from wsss.formats.overlay import Overlay
from wsss.formats.png import Png
from wsss.formats.probabilities import Probabilities

FORMATS: dict[str, Format] = {
    "png": Png(),
    "overlay": Overlay(),
    "coco": Coco(),
    "cvat": Cvat(),
    "labelstudio": LabelStudio(),
    "csv": Csv(),
    "probabilities": Probabilities(),
}

__all__ = ["FORMATS", "Collected", "Format", "Item"]
