"""What ``wsss new`` reads: photos, tags and masks, put together as a dataset with a split."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.dataset import Dataset
from pipeline.data import duplicates, photos
from pipeline.data.build_index import build_index
from pipeline.data.complete import InvalidFile
from pipeline.data.duplicates import Fingerprint
from pipeline.data.faults import Faults, hint
from pipeline.data.tags import collect
from pipeline.data.tags.names import Blanks, folded
from pipeline.data.tree import find_photos
from pipeline.errors import PipelineError, counted
from pipeline.stores.files import atomic, read_regular
from wsss import split

SHOWN = 5  # names in a line
FEW = 10  # photos of a class, below which its masks are likely to be poor
Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]  # items, label, number of items


@dataclass(frozen=True)
class Draft:
    """A dataset before it is written.

    Attributes:
        kind: of the tags, for the summary.
        tags: class names by id of the photo; empty for negatives.
        remarks: lines about what may be wrong, and on the photos that are left out.
        assumed: photos without an entry in the tags, which are negatives.
    """

    kind: str
    classes: list[str]
    tags: dict[str, tuple[str, ...]]
    train: list[str]
    evaluation: list[str]
    remarks: list[str]
    assumed: int

    def counts(self) -> Counter[str]:
        """Photos by class."""
        return Counter(name for names in self.tags.values() for name in names)

    @property
    def negatives(self) -> int:
        """Photos without any class."""
        return sum(not names for names in self.tags.values())

    def write(self, folder: Path, files: Mapping[str, str]) -> None:
        """Write classes, tags and lists; ``files`` has the name of each file by its key in ``dataset``."""
        texts = {
            "classes": "".join(f"{name}\n" for name in self.classes),
            "tags": "{\n" + ",\n".join(f"{_json(name)}: {_json(names)}" for name, names in self.tags.items()) + "\n}\n",
            "train": "".join(f"{name}\n" for name in self.train),
            "evaluation": "".join(f"{name}\n" for name in self.evaluation),
        }
        for key, text in texts.items():
            with atomic(folder / files[key]) as temporary:
                temporary.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Request:
    """What the user supplies; see the options of ``wsss new``."""

    photos: Path
    tags: Path
    masks: Path | None
    share: float
    seed: int
    leave_out: Sequence[str]
    blanks: Blanks | None
    negatives: bool
    skip_broken: bool


def read(request: Request, faults: Faults, threads: int, progress: Progress) -> Draft | None:
    """Read the tags, match them with the photos, and draw the split. All faults are added to ``faults``.

    Returns:
        None if nothing can be put together.
    """
    found = find_photos(request.photos, faults)
    if not found:
        return None
    before = len(faults)
    collected = collect(request.tags, found, faults, request.blanks)
    for line in collected.unmatched:
        faults.add("entry without a photo", str(line))
    classes = _classes(collected.classes, request.leave_out, faults)
    kept = set(classes)
    tags = {name: tuple(tag for tag in names if tag in kept) for name, names in collected.by_photo.items()}
    absent = collected.without_entry
    if absent and not request.negatives and collected.by_photo:
        few = ", ".join(found[name] for name in absent[:SHOWN]) + (", ..." if len(absent) > SHOWN else "")
        faults.add(
            "photo without tags",
            f"{request.tags}: has no entry for {len(absent)} of {len(found)} photos ({few}); tag them, or add "
            "--negatives if they show none of the classes",
        )
    tags |= dict.fromkeys(absent, ())
    tags = {name: tags[name] for name in found if name in tags}
    if not classes:
        if len(faults) == before:
            faults.add("classes", f"{request.tags}: read as {collected.kind}, names no class of any photo; add tags")
        return None
    masked = _masked(request, found, faults)
    prints, broken = _look(request.photos, {name: found[name] for name in tags}, threads, progress)
    tags = {name: names for name, names in tags.items() if name not in broken}
    if not request.skip_broken:
        for line in broken.values():
            faults.add("broken photo", f"{line}, or leave it out by --skip-broken")
    groups = _groups(list(tags), prints)
    if len(groups) < 2:
        rest = f", and {len(broken)} that cannot be read" if broken else ""
        line = f"{request.photos}: holds {counted(len(groups), 'different photo')}{rest}; at least 2 are needed"
        faults.add("few photos", line)
        return None
    train, evaluation = _draw(tags, groups, request, masked)
    if not train or not evaluation:
        return None
    remarks = [*collected.remarks, *_remarks(classes, tags, groups), *(f"left out: {line}" for line in broken.values())]
    return Draft(collected.kind, classes, tags, train, evaluation, remarks, sum(name in tags for name in absent))


def check(
    dataset: Dataset, saliency: Path | None, paths: Mapping[str, str], faults: Faults, threads: int, progress: Progress
) -> list[str]:
    """Read every photo, mask and saliency map as the index stage does; return its remarks.

    Args:
        paths: what messages say in place of parts of paths, such as those in the temporary folder.
    """
    said = set(faults.lines())
    try:
        return list(build_index(dataset, saliency, threads, progress).census.remarks)
    except PipelineError as error:
        for line in error.lines:
            for part, shown in paths.items():
                line = line.replace(part, shown)
            if line not in said:
                faults.add("photo, mask or saliency map", line)
    return []


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _classes(names: Sequence[str], leave_out: Sequence[str], faults: Faults) -> list[str]:
    """The classes without those to leave out."""
    by_form = {folded(name): name for name in names}
    dropped = set()
    for name in leave_out:
        if folded(name) in by_form:
            dropped.add(by_form[folded(name)])
        else:
            fix = hint(name, names, f"the classes are {', '.join(names[:20])}")
            faults.add("--leave-out", f"--leave-out {name}: is not a class of the tags; {fix}")
    kept = [name for name in names if name not in dropped]
    if names and not kept:
        faults.add("--leave-out", "--leave-out: leaves out every class; keep at least one")
    return kept


def _masked(request: Request, found: dict[str, str], faults: Faults) -> set[str] | None:
    """Ids of the photos with masks; None if no masks are supplied."""
    if request.masks is None:
        return None
    own = Faults()
    masks = find_photos(request.masks, own)
    if len(own):
        for line in own.lines():
            faults.add("masks", line)
        return set()
    masked = found.keys() & masks.keys()
    if not masked:
        one, other = next(iter(masks.values())), next(iter(found.values()))
        faults.add(
            "masks", f"{request.masks}: no mask has the name of a photo ({one}, but photos are {other}); rename them"
        )
    return masked


def _look(
    folder: Path, found: dict[str, str], threads: int, progress: Progress
) -> tuple[dict[str, Fingerprint], dict[str, str]]:
    """Read photos: the fingerprint of each by id, and a line on each broken one.

    HEIC photos that lack their package are in neither.
    """

    def look(name: str) -> Fingerprint | str | None:
        file = folder / found[name]
        try:
            return duplicates.fingerprint(photos.examine(read_regular(file)).rgb)
        except photos.HeicSupport:
            return None  # the index names the package
        except InvalidFile as error:
            return f"{file}: {error}"
        except OSError as error:
            return f"{file}: cannot be read ({error.strerror}); fix its permissions or the disk"

    pool = ThreadPoolExecutor(threads)
    try:
        seen = dict(zip(found, progress(pool.map(look, found), "photos read", len(found)), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
    prints = {name: one for name, one in seen.items() if isinstance(one, Fingerprint)}
    return prints, {name: one for name, one in seen.items() if isinstance(one, str)}


def _groups(names: Sequence[str], fingerprints: Mapping[str, Fingerprint]) -> list[list[str]]:
    """Photos that show the same picture, in groups; all others are groups of one. Photos without a fingerprint, too."""
    read, prints = list(fingerprints), list(fingerprints.values())
    leader = {name: name for name in names}

    def lead(name: str) -> str:
        while leader[name] != name:
            leader[name] = name = leader[leader[name]]
        return name

    pairs = [(group[0], other) for group in duplicates.equal(prints) for other in group[1:]]
    pairs += [(int(one), int(other)) for block in duplicates.near(prints) for one, other in block]
    for one, other in pairs:
        leader[lead(read[other])] = lead(read[one])
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(lead(name), []).append(name)
    return list(groups.values())


def _draw(
    tags: dict[str, tuple[str, ...]], groups: list[list[str]], request: Request, masked: set[str] | None
) -> tuple[list[str], list[str]]:
    """The split. Photos of the same picture stay together; if there are masks, only photos with masks are evaluated."""
    union = {group[0]: sorted({tag for name in group for tag in tags[name]}) for group in groups}
    members = {group[0]: group for group in groups}
    candidates = None if masked is None else {group[0] for group in groups if masked.issuperset(group)}
    parts = split.draw(union, request.share, request.seed, candidates)
    train, evaluation = ([name for leader in part for name in members[leader]] for part in parts)
    return train, evaluation


def _remarks(classes: Sequence[str], tags: dict[str, tuple[str, ...]], groups: list[list[str]]) -> list[str]:
    counts = Counter(tag for names in tags.values() for tag in names)
    remarks = []
    for name in classes:
        if counts[name] < FEW:
            remarks.append(
                f"{name}: has {counted(counts[name], 'photo')}; masks of a class with fewer than {FEW} are likely to "
                "be poor: add some, or use --leave-out"
            )
        elif counts[name] == len(tags):
            remarks.append(
                f"{name}: is in every photo, so that nothing shows what is not {name}; add negatives, photos without it"
            )
    for group in groups:
        if len({tags[name] for name in group}) > 1:
            remarks.append(f"{' and '.join(group[:SHOWN])}: show the same picture, but their tags differ")
    return remarks
