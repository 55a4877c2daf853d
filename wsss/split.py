"""A split of photos into training and evaluation, drawn by a seed and even over the classes."""

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping

NEGATIVE = ""  # stands for the class of photos without one


def draw(
    tags: Mapping[str, Collection[str]], share: float, seed: int, candidates: Collection[str] | None = None
) -> tuple[list[str], list[str]]:
    """Draw the evaluation photos; return the names of training and evaluation photos in the order of ``tags``.

    Each class, and the photos without one, lends its ``share`` of photos to the evaluation, as nearly as photos with
    several classes allow. A class of two or more photos has at least one on either side. The draw of a photo depends
    on its name and the seed alone, so that a further photo moves few others.

    Args:
        tags: class names by name of the photo.
        share: of the photos to evaluate, above 0 and below 1.
        candidates: the photos that may be evaluated, such as those with masks; None: all.
    """
    members: dict[str, list[str]] = {}
    for name in sorted(tags, key=lambda name: (_number(seed, name), name)):
        for tag in set(tags[name]) or {NEGATIVE}:
            members.setdefault(tag, []).append(name)
    training = Counter({tag: len(names) for tag, names in members.items()})
    wanted = {tag: max(round(share * count), min(1, count - 1)) for tag, count in training.items()}
    evaluation: dict[str, None] = {}
    taken: Counter[str] = Counter()

    def excess(name: str) -> int:
        """How many of the photo's classes have enough evaluation photos already."""
        return sum(taken[tag] >= wanted[tag] for tag in set(tags[name]))

    for tag in sorted(members, key=lambda tag: (len(members[tag]), tag)):  # the rarest first
        for name in sorted(members[tag], key=excess):  # stable: then in the order of the draw
            own = set(tags[name]) or {NEGATIVE}
            if taken[tag] >= wanted[tag]:
                break
            allowed = candidates is None or name in candidates
            if allowed and name not in evaluation and all(training[one] > 1 for one in own):
                evaluation[name] = None
                taken.update(own)
                training.subtract(own)
    if not evaluation:  # no class can spare a photo; one is evaluated all the same
        most = sorted(members, key=lambda tag: -len(members[tag]))
        names = [name for tag in most for name in members[tag] if candidates is None or name in candidates]
        evaluation = dict.fromkeys(names[:1])
    return [name for name in tags if name not in evaluation], [name for name in tags if name in evaluation]


def _number(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode(errors="surrogateescape")).digest()
