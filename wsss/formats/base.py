"""What a format is, and the segmented photo that it writes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

IGNORE = 255  # a pixel without a label, in pseudo labels and masks drawn by people


@dataclass(frozen=True)
class Item:
    """A segmented photo.

    Attributes:
        name: of its output files, without a suffix; '/' separates folders.
        photo: path of the photo as annotation files name it, with '/'.
        height, width: of the photo as a viewer shows it.
        classes: the name of each class id, background first.
        mask: H x W class ids; None if there are only probabilities.
        rgb: H x W x 3, for the overlay; None if no format of the run needs it.
        levels: h x w uint8 probabilities (255 is 1) by class id.
        confidence: mean probability of each class id of the mask over its pixels; empty if unknown.
        score: mean probability of the mask's class over all pixels; None if unknown.
    """

    name: str
    photo: str
    height: int
    width: int
    classes: tuple[str, ...]
    mask: NDArray[np.uint8] | None = None
    rgb: NDArray[np.uint8] | None = None
    levels: Mapping[int, NDArray[np.uint8]] = field(default_factory=dict)
    confidence: Mapping[int, float] = field(default_factory=dict)
    score: float | None = None

    @property
    def labels(self) -> NDArray[np.uint8]:
        """The mask, which formats that need one can rely on."""
        assert self.mask is not None
        return self.mask

    def present(self) -> list[int]:
        """Ids of the object classes in the mask."""
        return [int(number) for number in np.unique(self.labels) if number not in (0, IGNORE)]


class Format(Protocol):
    """A format. Its files lie in the output folder; those of single photos in a subfolder ``folder``.

    Attributes:
        needs_photo: whether ``Item.rgb`` must be set.
        needs: 'mask' or 'levels', the part of an item that is written.
    """

    needs_photo: bool
    needs: str

    def write(self, item: Item, folder: Path) -> Any:
        """Write the photo's own files, if the format has any, and return what ``join`` needs, as JSON types."""

    def files(self, name: str, folder: Path) -> list[Path]:
        """The photo's own files that must exist if it was written; ``folder`` is the output folder."""


@runtime_checkable
class Collected(Protocol):
    """A format whose files describe all photos together."""

    def join(self, entries: Iterable[Any], classes: tuple[str, ...], folder: Path) -> None:
        """Write the files from the values that ``write`` returned, in the order of the photos."""


def runs(flat: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Lengths and values of the runs of equal values in a non-empty one-dimensional array."""
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    return np.diff(np.append(starts, len(flat))).astype(np.int64), flat[starts]


def box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """(left, top, width, height) of the pixels that are set; at least one is."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1
