"""The census of a dataset: what a person would check by looking at it, as counts for the index stage and the report.

It counts masks. Only the report may read it, so that no training depends on a mask.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data import duplicates
from pipeline.data.agreement import Agreement, contradictions
from pipeline.data.duplicates import Fingerprint
from pipeline.data.faults import Faults
from pipeline.errors import PipelineError

SHOWN = 5  # images, pairs or classes that a remark names
HEADINGS = ("class", "tags", "masks", "tags", "masks", "both", "tag only", "mask only", "pixels %")
GROUPS = (("", 1), ("train", 2), ("evaluation", 2), ("tags and masks", 3), ("masks", 1))  # title, columns
SPLITS = ("train", "evaluation")


@dataclass(frozen=True)
class Sight:
    """What is kept of an image for the census.

    Attributes:
        tags: class ids; None if they are unknown.
        size: (height, width) of the file.
        print: None if the image cannot be decoded.
        mask: pixels of each of the 256 values; None without a mask.
    """

    id: str
    split: str
    tags: tuple[int, ...] | None
    size: tuple[int, int]
    print: Fingerprint | None
    mask: NDArray[np.intp] | None


@dataclass(frozen=True)
class Split:
    """Counts of a split. Sizes are [width, height]; the median is that of the images ordered by their pixels.

    Attributes:
        tagged: images whose tags are known.
        negatives: those of them that are known to show no class.
    """

    images: int
    tagged: int
    negatives: int
    masked: int
    smallest: Sequence[int]
    median: Sequence[int]
    largest: Sequence[int]


@dataclass(frozen=True)
class Class:
    """Images by class: tagged, and with a mask that holds it; then those with tags and a mask; ``pixels`` in masks."""

    name: str
    tags: Mapping[str, int]
    masks: Mapping[str, int]
    both: int
    tag_only: int
    mask_only: int
    pixels: int


@dataclass(frozen=True)
class Census:
    """Counts of a dataset, and remarks, each a line, on what may be wrong with it.

    Attributes:
        compared: images that have tags and a mask.
        agreeing: those whose tags are the classes of their mask.
        pixels: pixels of all masks, without those of value 255.
        source: where the tags were read, and the kind of file that was recognized.
    """

    splits: Mapping[str, Split]
    classes: Sequence[Class]
    compared: int
    agreeing: int
    pixels: int
    remarks: Sequence[str]
    source: str = ""

    @property
    def untaught(self) -> list[str]:
        """Classes that no training image is tagged with."""
        return [entry.name for entry in self.classes if not entry.tags["train"]]

    def rows(self) -> list[list[str]]:
        """Rows of the table under HEADINGS: one for each class after one for all images. '-' stands for no masks."""
        masked = any(split.masked for split in self.splits.values())

        def row(name: str, counts: Sequence[tuple[int, int]], compared: Sequence[int], share: str) -> list[str]:
            cells = [text for tags, masks in counts for text in (f"{tags}", f"{masks}" if masked else "-")]
            return [name, *cells, *(f"{n}" if self.compared else "-" for n in compared), share if masked else "-"]

        counts = [(self.splits[split].tagged, self.splits[split].masked) for split in SPLITS]
        first = row("all images", counts, (self.agreeing,), "")
        first[6:6] = ["", ""]
        return [
            first,
            *(
                row(
                    entry.name,
                    [(entry.tags[split], entry.masks[split]) for split in SPLITS],
                    (entry.both, entry.tag_only, entry.mask_only),
                    f"{100 * entry.pixels / max(1, self.pixels):.1f}",
                )
                for entry in self.classes
            ),
        ]

    def facts(self) -> list[tuple[str, str]]:
        """What the table does not show, as (term, description)."""
        facts = []
        for name, split in self.splits.items():
            low, middle, high = (f"{size[0]}x{size[1]}" for size in (split.smallest, split.median, split.largest))
            sizes = f"{middle} pixels" if low == high else f"{low} to {high} pixels, median {middle}"
            negatives = f", {split.negatives} without a class" if split.negatives else ""
            facts.append((name, f"{split.images} images of {sizes}{negatives}"))
        if self.source:
            facts.append(("tags", self.source))
        if self.compared:
            share = f"{100 * self.agreeing / self.compared:.1f} %"
            facts.append(("tags and masks", f"equal in {self.agreeing} of {self.compared} images ({share})"))
        return facts

    def text(self) -> str:
        """The table as text, after the facts and before the remarks."""
        rows = [list(HEADINGS), *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
        titles, column = [], 0
        for title, span in GROUPS:
            width = sum(widths[column : column + span]) + 2 * (span - 1)
            titles.append(f"{title[:width]:-<{width}}" if title else " " * width)
            column += span
        lines = [f"{term}: {description}" for term, description in self.facts()]
        lines.append("  ".join(titles))
        for row in rows:
            cells = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, *(f"warning: {remark}" for remark in self.remarks)])

    def dump(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def read(path: Path) -> Census:
    """Read the census in dataset.json.

    Raises:
        PipelineError: the file cannot be read or is not a census.
    """
    try:
        raw = json.loads(path.read_text())
        return Census(
            {name: Split(**split) for name, split in raw["splits"].items()},
            [Class(**entry) for entry in raw["classes"]],
            *(raw[key] for key in ("compared", "agreeing", "pixels", "remarks", "source")),
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise PipelineError(f"{path}: not a census ({error}); run the index stage again") from error


def take(
    sights: Sequence[Sight], classes: Sequence[str], evaluation: Path, masks: Path, refuse: bool, faults: Faults
) -> Census:
    """Count a dataset and compare its tags with its masks and its pictures with each other.

    Args:
        sights: the images that could be read.
        evaluation: the list of evaluation images, for messages.
        masks: the folder of masks, for messages.
        refuse: whether masks that contradict the tags throughout, and a picture in both splits, are faults; otherwise
            they are remarks.
    """
    remarks: list[str] = []

    def fault(kind: str, line: str) -> None:
        if refuse:
            faults.add(kind, f"{line}, or set dataset.contradictions to warn")
        else:
            remarks.append(line)

    compared = [sight for sight in sights if sight.tags is not None and sight.mask is not None]
    agreement = _agreement(compared, len(classes))
    for line in contradictions(agreement, classes):
        fault("masks contradict tags", f"{masks}: {line}")
    _compare_pictures(sights, lambda kind, line: fault(kind, f"{evaluation}: {line}"), remarks)
    differing = agreement.differing
    if len(differing):
        some = "; ".join(_difference(compared[n], classes) for n in differing[:SHOWN])
        remarks.append(f"tags and masks differ in {len(differing)} of {len(compared)} images: {some}{_more(differing)}")
    census = Census(
        {split: _split([sight for sight in sights if sight.split == split]) for split in SPLITS},
        [_class(sights, agreement, k, name) for k, name in enumerate(classes, 1)],
        len(compared),
        len(compared) - len(differing),
        int(sum(sight.mask[:255].sum() for sight in sights if sight.mask is not None)),
        remarks,
    )
    _remark_classes(census, remarks)
    return census


def _agreement(compared: Sequence[Sight], count: int) -> Agreement:
    tagged = np.zeros((len(compared), count + 1), np.bool_)
    held = np.zeros((len(compared), 256), np.bool_)
    for number, sight in enumerate(compared):
        assert sight.tags is not None
        assert sight.mask is not None
        tagged[number, list(sight.tags)] = True
        held[number] = sight.mask > 0
    tagged[:, 0] = False  # unknown tags, which are faults
    return Agreement(tagged, held)


def _split(sights: Sequence[Sight]) -> Split:
    sizes = sorted(((sight.size[1], sight.size[0]) for sight in sights), key=lambda size: (size[0] * size[1], size))
    sizes = sizes or [(0, 0)]
    masked = sum(sight.mask is not None for sight in sights)
    tagged = sum(sight.tags is not None for sight in sights)
    negatives = sum(sight.tags == () for sight in sights)
    return Split(len(sights), tagged, negatives, masked, sizes[0], sizes[len(sizes) // 2], sizes[-1])


def _class(sights: Sequence[Sight], agreement: Agreement, k: int, name: str) -> Class:
    tags = {split: sum(k in (sight.tags or ()) for sight in sights if sight.split == split) for split in SPLITS}
    pixels = {split: [int(s.mask[k]) for s in sights if s.split == split and s.mask is not None] for split in SPLITS}
    masks = {split: sum(count > 0 for count in counts) for split, counts in pixels.items()}
    both, tag_only, mask_only = (int(n[k]) for n in (agreement.both, agreement.tag_only, agreement.mask_only))
    return Class(name, tags, masks, both, tag_only, mask_only, sum(map(sum, pixels.values())))


def _compare_pictures(sights: Sequence[Sight], fault: Any, remarks: list[str]) -> None:
    shown = [sight for sight in sights if sight.print is not None]
    prints = [sight.print for sight in shown if sight.print is not None]
    same: dict[str, list[str]] = {split: [] for split in SPLITS}
    for group in duplicates.equal(prints):
        train, evaluation = ([shown[n].id for n in group if shown[n].split == split] for split in SPLITS)
        for name in evaluation if train else ():
            fault("picture in both splits", f"{name} is the same picture as training image {train[0]}; take it out")
        for split, names in (("train", train), ("evaluation", evaluation)):
            same[split] += [f"{names[0]} = {name}" for name in names[1:]]
    for split, copies in same.items():
        if copies:
            title = f"{len(copies)} {split} images are copies of other {split} images"
            remarks.append(f"{title}: {', '.join(copies[:SHOWN])}{_more(copies)}")
    across: list[str] = []
    within = dict.fromkeys(SPLITS, 0)
    for pairs in duplicates.near(prints):
        for first, second in ((shown[a], shown[b]) for a, b in pairs):
            if first.split == second.split:
                within[first.split] += 1
            else:
                train, evaluation = sorted((first, second), key=lambda sight: SPLITS.index(sight.split))
                across.append(f"{train.id} = {evaluation.id}")
    if across:
        pictures = f"{len(across)} training images look like evaluation images (encoded again, resized or mirrored)"
        remarks.append(f"{pictures}: {', '.join(across[:SHOWN])}{_more(across)}; look at them")
    for split, number in within.items():
        if number:
            remarks.append(f"{number} pairs of {split} images look alike (encoded again, resized or mirrored)")


def _remark_classes(census: Census, remarks: list[str]) -> None:
    shown = {entry.name: max(entry.masks["evaluation"], entry.tags["evaluation"]) for entry in census.classes}
    lacking = [name for name in census.untaught if shown[name]]
    if lacking:
        some = ", ".join(f"{name} ({shown[name]} in evaluation)" for name in lacking[:SHOWN])
        effect = "the IoU of such a class can only be 0, which lowers the mean"
        remarks.append(f"no training image is tagged with {some}{_more(lacking)}; {effect}")
    nowhere = [name for name in census.untaught if not shown[name]]
    if nowhere:
        remarks.append(f"no image of either split shows {', '.join(nowhere[:SHOWN])}{_more(nowhere)}")
    if census.splits["evaluation"].masked:
        unseen = [entry.name for entry in census.classes if not entry.masks["evaluation"] and entry.name not in nowhere]
        if unseen:
            remarks.append(f"no mask of an evaluation image holds {', '.join(unseen[:SHOWN])}{_more(unseen)}")
    for entry in census.classes:
        images = census.splits["train"].images
        if entry.tags["train"] == images > 1:
            remarks.append(f"every training image is tagged with {entry.name}; a classifier needs images without it")


def _difference(sight: Sight, classes: Sequence[str]) -> str:
    assert sight.mask is not None
    held = {k for k in range(1, len(classes) + 1) if sight.mask[k]}
    tags = set(sight.tags or ())
    tag_only, mask_only = (", ".join(classes[k - 1] for k in sorted(ids)) for ids in (tags - held - {0}, held - tags))
    parts = [f"the mask lacks {tag_only}" if tag_only else "", f"the tags lack {mask_only}" if mask_only else ""]
    return f"{sight.id} ({' and '.join(filter(None, parts))})"


def _more(items: Sequence[Any] | NDArray[Any]) -> str:
    return f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
