"""Image-level tags of photos, from the files and folders that people have.

``read_tags`` reads them for known classes, and ``collect`` finds the classes in them. Both recognize the kind of a
file by its content (``reading``), match its references with the photos there are (``matching``) and its names with
classes (``names``).
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.data.checks import IGNORE
from pipeline.data.faults import LIMIT, Faults
from pipeline.data.tags import reading
from pipeline.data.tags.annotations import Annotations, Field, Pairs, Reference
from pipeline.data.tags.matching import Photos
from pipeline.data.tags.names import Blanks, ClassNames, folded, means_nothing, nearest, split_without_classes, tidy

SHOWN = 5  # items that a remark names
LONGEST_NUMBER = 19  # digits from which a text is no class id


@dataclass(frozen=True)
class Tags:
    """Sorted class ids in 1..K by image id.

    Attributes:
        by_image: the images that the tags name; () if they say that an image shows no class.
        source: the kind and name of the file.
        unmatched: references that fit no photo.
        remarks: lines on what was interpreted or left out.
    """

    by_image: dict[str, tuple[int, ...]]
    source: str
    unmatched: list[Reference] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Collected:
    """Tags and the classes that they name.

    Attributes:
        kind: what was recognized, for people.
        classes: names of classes 1..K: in the file's own order if it declares them, otherwise sorted.
        by_photo: class names by photo id; () if the tags say that a photo shows no class.
        without_entry: photos that the tags do not name.
        unmatched: a line for each entry that fits no photo, with the most similar photos.
        remarks: lines on what was interpreted.
    """

    kind: str
    classes: list[str]
    by_photo: dict[str, tuple[str, ...]]
    without_entry: list[str]
    unmatched: list[str]
    remarks: list[str]


def read_tags(
    path: Path,
    classes: Sequence[str],
    photos: Mapping[str, str],
    faults: Faults,
    listed: Collection[str] | None = None,
    other_classes: Literal["refuse", "leave_out"] = "refuse",
) -> Tags:
    """Read the tags of photos; faults are added to ``faults``.

    Args:
        photos: the path of each photo below the photos' folder, by id.
        listed: the photos of interest; tags of others are not checked. None: all.
        other_classes: whether a class that is not one of ``classes`` is a fault, or is left out.
    """
    finder = Photos(photos)
    wanted = photos if listed is None else set(listed)
    annotations = reading.read(path, finder, wanted, classes, faults)
    matched, unmatched = _match(annotations, finder)
    resolver = _Resolver(annotations, classes, other_classes)
    by_image = {
        photo: resolver.class_ids(photo, reference, tags)
        for photo, entries in matched.items()
        if photo in wanted
        for reference, tags in [(entries[0][0], [tag for _, tags in entries for tag in tags])]
    }
    resolver.finish()
    return Tags(by_image, f"{path.name} ({annotations.kind})", unmatched, [*annotations.remarks, *resolver.remarks])


def collect(path: Path, photos: Mapping[str, str], faults: Faults, blanks: Blanks | None = None) -> Collected:
    """Read tags and find their classes. Names that differ only in case, blanks, '_' or '-' are one class.

    Args:
        photos: the path of each photo below the photos' folder, by id.
        blanks: whether blanks in a field separate tags or belong to names; None: decided by the content. A fault if
            that leaves a doubt.
    """
    finder = Photos(photos)
    annotations = reading.read(path, finder, photos, None, faults)
    matched, unmatched = _match(annotations, finder)
    fields = [tag for entries in matched.values() for _, tags in entries for tag in tags if isinstance(tag, Field)]
    split, doubtful, remark = split_without_classes(list(dict.fromkeys(fields)), blanks)
    if doubtful:
        annotations.fault("tags with blanks", _doubt(doubtful))
    remarks = [*annotations.remarks, *filter(None, [remark])]
    named: dict[str, list[str]] = {}
    for photo, entries in matched.items():
        named[photo] = []
        for reference, tags in entries:
            for tag in tags:
                if isinstance(tag, Field):
                    named[photo] += split[tag]
                elif isinstance(tag, str) and tidy(tag):
                    named[photo].append(tidy(tag))
                elif isinstance(tag, int) and not isinstance(tag, bool) and abs(tag) < 10**LONGEST_NUMBER:
                    named[photo].append(str(tag))
                elif not isinstance(tag, str):
                    annotations.fault("unknown tag", f"{reference} has the unknown tag {_shown(tag)}")
    classes, by_fold = _classes_of(named, annotations, remarks)
    by_photo = {
        photo: tuple(sorted({by_fold[fold] for name in names if (fold := folded(name)) in by_fold}, key=classes.index))
        for photo, names in named.items()
    }
    lines = []
    for number, reference in enumerate(unmatched):
        near = finder.nearest(reference) if number < LIMIT else []
        lines.append(f"{reference}: no photo has this name" + (f"; similar: {', '.join(near)}" if near else ""))
    without_entry = [name for name in photos if name not in by_photo]
    return Collected(annotations.kind, classes, by_photo, without_entry, lines, remarks)


Entries = dict[str, list[tuple[Reference, list[Any]]]]  # photo -> (reference, tags) of its entries


def _match(annotations: Annotations, finder: Photos) -> tuple[Entries, list[Reference]]:
    """Match entries with photos; return also the references that fit none.

    If several entries fit a photo, those whose paths have the most folders in common with it count.
    """
    matches = {reference: finder.find(reference) for reference in annotations.entries}
    best: dict[str, int] = {}
    for match in matches.values():
        if match and len(match.photos) == 1:
            best[match.photos[0]] = min(match.dropped, best.get(match.photos[0], match.dropped))
    entries: Entries = {}
    lost: list[Reference] = []
    for reference, match in matches.items():
        if match and len(match.photos) > 1:
            some = ", ".join(match.photos[:SHOWN])
            annotations.fault("ambiguous photo", f"{reference} may be {some}; write its path below the photos' folder")
        elif match is None or (match.dropped > best[match.photos[0]] and not annotations.joins_photos):
            lost.append(reference)
        else:
            entries.setdefault(match.photos[0], []).append((reference, annotations.entries[reference]))
    for photo, several in entries.items():
        if len(several) > 1 and not annotations.joins_photos:
            names = " and ".join(str(reference) for reference, _ in several[:2])
            annotations.fault("image tagged twice", f"{photo} is tagged twice, as {names}; remove one")
    return entries, lost


class _Resolver:
    """Converts tags, class names or numbers, to class ids."""

    def __init__(self, annotations: Annotations, classes: Sequence[str], other_classes: str) -> None:
        self.annotations = annotations
        self.names = ClassNames(classes)
        self.leave_out = other_classes == "leave_out"
        self.remarks: list[str] = []
        self._nothing: Counter[str] = Counter()
        self._unknown: dict[str, list[str]] = {}  # name -> photos

    def class_ids(self, photo: str, reference: Reference, tags: Sequence[Any]) -> tuple[int, ...]:
        """Sorted class ids of a photo."""
        count = len(self.names.names)
        if self.annotations.widths and (width := self.annotations.widths[reference]) != count:
            text = f"{photo} has {width} values for {count} classes; correct dataset.classes"
            self.annotations.fault("length of a class vector", text)
            return ()
        single = [part for tag in tags for part in (self.names.split(tag) if isinstance(tag, Field) else [tag])]
        return tuple(sorted({number for tag in single for number in self._ids(photo, tag)}))

    def _ids(self, photo: str, tag: Any) -> Iterator[int]:
        if isinstance(tag, str):
            ids = self.names.ids(tag)
            if len(ids) > 1:
                choices = " or ".join(self.names.names[number - 1] for number in ids)
                self.annotations.fault("ambiguous class", f"{photo} has the tag {tag!r}, which may be {choices}")
            if ids:
                yield ids[0]
                return
        if isinstance(tag, str) and tag.isascii() and tag.lstrip("-").isdecimal() and len(tag) < LONGEST_NUMBER:
            tag = int(tag)
        if isinstance(tag, int) and not isinstance(tag, bool):
            first, count = self.annotations.first_id, len(self.names.names)
            if first <= tag < first + count:
                yield tag - first + 1
            else:
                text = f"{photo} has class id {tag}, but ids are {first}..{first + count - 1} here; correct it"
                self.annotations.fault("class id out of range", text)
        elif isinstance(tag, str) and means_nothing(tag):
            self._nothing[tag] += 1
        elif isinstance(tag, str):
            self._unknown.setdefault(tidy(tag), []).append(photo)
        else:
            fix = "write a class name or id"
            self.annotations.fault("unknown tag", f"{photo} has the unknown tag {_shown(tag)}; {fix}")

    def finish(self) -> None:
        """Report the tags that are no classes, each once."""
        self.remarks += [_nothing(name, count) for name, count in self._nothing.items()]
        for name, photos in self._unknown.items():
            near = nearest(name, self.names.names)
            if not self.leave_out:
                where = f"{photos[0]} has" if len(photos) == 1 else f"{photos[0]} and {len(photos) - 1} more have"
                fix = f"did you mean {near[0]}?" if near else "correct it, add it to dataset.classes"
                line = f"{where} the unknown tag {name!r}; {fix}, or leave out such classes:"
                self.annotations.fault("unknown tag", f"{line} set dataset.other_classes to leave_out")
        if self._unknown and self.leave_out:
            parts = []
            for name, photos in sorted(self._unknown.items(), key=lambda item: -len(item[1]))[: SHOWN * 4]:
                near = nearest(name, self.names.names)
                parts.append(f"{name} ({len(photos)} images{f', similar to {near[0]}' if near else ''})")
            self.remarks.append(f"classes of the tags that are left out: {', '.join(parts)}")


def _shown(tag: Any) -> str:
    if isinstance(tag, str | int | float) or tag is None:
        return repr(tag)
    return f"(a {'mapping' if isinstance(tag, Pairs) else type(tag).__name__})"


def _doubt(names: Sequence[str]) -> str:
    more = f", and so may {len(names) - 1} more" if len(names) > 1 else ""
    reading = f"{names[0]!r} may be one class or the tags {' and '.join(names[0].split())}{more}"
    return f"{reading}; add --blanks separate if blanks separate tags, or --blanks belong if they belong to names"


def _nothing(name: str, count: int) -> str:
    return f"the tag {name!r} of {count} images stands for no class; list it in the class file if it is one"


def _classes_of(
    named: Mapping[str, Sequence[str]], annotations: Annotations, remarks: list[str]
) -> tuple[list[str], dict[str, str]]:
    """The classes in the order of their ids, and the class of each folded name."""
    spellings: dict[str, Counter[str]] = {}
    images: Counter[str] = Counter()
    for names in named.values():
        for name in names:
            spellings.setdefault(folded(name), Counter())[name] += 1
        images.update(set(map(folded, names)))
    for fold in [fold for fold in spellings if means_nothing(fold)]:
        remarks.append(f"the tag {max(spellings.pop(fold))!r} of {images[fold]} images stands for no class")
    by_fold: dict[str, str] = {}
    for fold, counts in spellings.items():
        by_fold[fold] = max(counts, key=lambda name: counts[name])
        if len(counts) > 1:
            remarks.append(f"{', '.join(map(repr, counts))} are one class, {by_fold[fold]!r}")
    declared = [folded(name) for name in annotations.classes]
    unused = [name for name in annotations.classes if folded(name) not in spellings and not means_nothing(name)]
    if unused:
        some = ", ".join(unused[:SHOWN]) + (f" and {len(unused) - SHOWN} more" if len(unused) > SHOWN else "")
        remarks.append(f"no photo shows {some}, so that this is no class")
    numeric = all(fold.isdecimal() and len(fold) < LONGEST_NUMBER for fold in by_fold)
    rest = sorted(set(by_fold) - set(declared), key=lambda fold: (int(fold), "") if numeric else (0, fold))
    order = [fold for fold in dict.fromkeys(declared) if fold in by_fold] + rest
    for fold in order:
        near = nearest(fold, [other for other in order if images[other] >= 20 * images[fold]])
        if near:
            one, other = by_fold[fold], by_fold[near[0]]
            remarks.append(f"the class {one!r} ({images[fold]} images) resembles {other!r} ({images[near[0]]})")
    if len(order) >= IGNORE:
        text = f"names {len(order)} classes, but at most {IGNORE - 1} are possible; check that it holds tags"
        annotations.fault("classes", f"{text}, such as {by_fold[order[0]]!r}")
    if numeric and order:
        remarks.append("the classes are numbers; replace them by names in the class file")
    return [by_fold[fold] for fold in order], by_fold


__all__ = ["Collected", "Tags", "collect", "read_tags"]
