"""Comparison of tags and masks over the images that have both.

Single disagreements are normal in real data: VOC's tags count objects that its masks mark as 255. A class whose masks
contradict its tags throughout is a fault of the dataset, such as masks that count the classes from 0. It would falsify
every score.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORE = 255
MANY = 20  # tags without which masks that look like those of other images count as chance
LEAST = 5  # images without which a contradiction counts as chance
FITS, CONTRADICTS = 0.9, 0.5  # Dice coefficients of the images tagged with a class and those whose masks hold an id


@dataclass(frozen=True)
class Agreement:
    """Images that have tags and a mask.

    Attributes:
        tagged: N x (K + 1) whether image n has the tag k; column 0 is unused.
        held: N x 256 whether the mask of image n holds the value v.
    """

    tagged: NDArray[np.bool_]
    held: NDArray[np.bool_]

    @property
    def both(self) -> NDArray[np.intp]:
        """For each class id, the images with its tag whose mask holds it."""
        return np.asarray((self.tagged & self._own).sum(0))

    @property
    def tag_only(self) -> NDArray[np.intp]:
        """For each class id, the images with its tag whose mask lacks it."""
        return np.asarray((self.tagged & ~self._own).sum(0))

    @property
    def mask_only(self) -> NDArray[np.intp]:
        """For each class id, the images without its tag whose mask holds it."""
        return np.asarray((~self.tagged & self._own).sum(0))

    @property
    def differing(self) -> NDArray[np.intp]:
        """The images whose tags are not the classes of their mask."""
        return np.flatnonzero((self.tagged != self._own).any(1))

    @property
    def _own(self) -> NDArray[np.bool_]:
        own = self.held[:, : self.tagged.shape[1]].copy()
        own[:, 0] = False
        return own

    def dice(self) -> NDArray[np.float64]:
        """(K + 1) x 256 Dice coefficient of the images tagged k and the images whose masks hold v."""
        together = self.tagged.T.astype(np.float64) @ self.held.astype(np.float64)
        total = self.tagged.sum(0)[:, None] + self.held.sum(0)[None]
        return np.divide(2 * together, total, out=np.zeros_like(together), where=total > 0)


def contradictions(agreement: Agreement, classes: Sequence[str]) -> list[str]:
    """Describe the classes whose masks contradict their tags throughout, one line for each.

    These are classes with ``LEAST`` tagged images of which no mask holds the class, and classes whose images are those
    of another id. Fewer images of a class suffice if no tag of the dataset is in its mask, or if all ids are shifted.
    Masks that hold less than half of all tags, without such a pattern, are one line for the dataset.
    """
    count, both, dice = agreement.tagged.sum(0), agreement.both, agreement.dice()
    used = [k for k in range(1, len(classes) + 1) if count[k]]
    shift = _shift(dice, used) if count.sum() >= LEAST else 0
    nowhere = count.sum() >= LEAST and both.sum() == 0
    substitutes = {k: _substitute(dice, k) for k in used}
    lines = []
    for k in used:
        alone = count[k] >= LEAST and (both[k] == 0 or substitutes[k] is not None)
        if alone or nowhere or (shift and dice[k, k] <= CONTRADICTS):
            hold = "hold" if both[k] > 1 else "holds"
            holds = f"{both[k] or 'none'} of the {count[k]} masks of images tagged with it {hold}"
            cause = _cause(agreement, k, shift, substitutes[k], classes)
            lines.append(f"class {classes[k - 1]}: {holds} its id {k}; {cause}")
    unrelated = count.sum() >= MANY and 0 < both.sum() < CONTRADICTS * count.sum()
    if unrelated and not shift and not any(substitutes.values()):
        held = f"the masks hold {both.sum()} of the {count.sum()} tags of their images"
        return [f"{held}; they look like masks of other images: correct their names"]
    return lines


def _shift(dice: NDArray[np.float64], used: Sequence[int]) -> int:
    """Return d if masks fit the tags as k + d throughout, but not as k; else 0."""
    own = float(np.mean([dice[k, k] for k in used]))
    if own <= CONTRADICTS:
        for shift in (-1, 1):
            if float(np.mean([dice[k, k + shift] for k in used])) >= FITS:
                return shift
    return 0


def _substitute(dice: NDArray[np.float64], k: int) -> int | None:
    """Return another id that the masks of the images tagged k hold; None if they fit k, or if none is distinctive.

    0 and 255 are in nearly every mask. The id of a class that fits its own tags belongs to that class.
    """
    if dice[k, k] > CONTRADICTS:
        return None
    fitting = [v for v in range(1, len(dice)) if v != k and dice[k, v] >= FITS and dice[v, v] <= CONTRADICTS]
    return max(fitting, key=lambda v: float(dice[k, v]), default=None)


def _cause(agreement: Agreement, k: int, shift: int, substitute: int | None, classes: Sequence[str]) -> str:
    """The likely cause of a contradiction, and the fix."""
    masks = agreement.held[agreement.tagged[:, k]]
    values = set(np.flatnonzero(masks.any(0)).tolist())
    if values <= {0, IGNORE} and masks[:, IGNORE].any() and (len(classes) == 1 or not shift):
        return f"the masks hold only {_listed(values)}, and 255 means ignore; save the object as {k} in the masks"
    if shift:
        where = "from 0" if shift < 0 else "from 2"
        fix = f"{'add' if shift < 0 else 'subtract'} 1, so that 0 is background and 255 is ignored"
        return f"ids look shifted by one: the masks count classes {where}; {fix}"
    if substitute is not None:
        name = classes[substitute - 1]
        return f"the masks hold {substitute} ({name}) instead; give masks, tags and dataset.classes the same order"
    return f"the masks hold {_listed(values)}; correct the masks or dataset.classes"


def _listed(values: set[int]) -> str:
    ordered = sorted(values)
    return " and ".join(map(str, ordered)) if len(ordered) < 3 else ", ".join(map(str, ordered[:8]))
