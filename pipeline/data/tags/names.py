"""Class names: spellings that differ only in case, blanks, '_' or '-' are one name."""

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from pipeline.data.tags.annotations import Field

# Tags that stand for no class, unless a class has that name
_NOTHING = re.compile(r"background|negatives?|none|null|nothing|no (?:objects?|class)|unlabell?ed")
_LONGEST = 200  # characters of a name that are compared
SEPARATORS = ";,|"
Blanks = Literal["separate", "belong"]  # whether blanks separate tags or belong to names


def tidy(name: str) -> str:
    """A name in NFC, without blanks at its ends and with single ones within."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def folded(name: str) -> str:
    """A name as it is compared: in one case, with one blank for each run of blanks, '_' and '-'."""
    text = unicodedata.normalize("NFKC", name).casefold()
    text = re.sub(r"\s*([;,|])\s*", r"\1", re.sub(r"[\s_-]+", " ", text))
    return " ".join(text.split()) or tidy(name)


_FOLDS: tuple[Callable[[str], str], ...] = (tidy, lambda name: tidy(name).casefold(), folded)


def means_nothing(name: str) -> bool:
    """Whether a tag stands for no class, unless a class has that name."""
    return bool(_NOTHING.fullmatch(folded(name)))


class ClassNames:
    """Finds classes by name."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._exact = {name: number for number, name in enumerate(names, 1)}
        self._levels: list[dict[str, list[int]]] = []
        for fold in _FOLDS:
            level: dict[str, list[int]] = {}
            for number, name in enumerate(names, 1):
                level.setdefault(fold(name), []).append(number)
            self._levels.append(level)
        self.most_words = max((len(re.split(r"[\s_;,|-]+", name.strip())) for name in names), default=1)

    def ids(self, name: str) -> list[int]:
        """The class ids in 1..K that a name may mean: one, none, or several if it is ambiguous."""
        if name in self._exact:
            return [self._exact[name]]
        for level, fold in zip(self._levels, _FOLDS, strict=True):
            if found := level.get(fold(name)):
                return found
        return []

    def split(self, field: str) -> list[str]:
        """Split a field at ';', ',' and '|', or at blanks without these. A class name may contain them itself."""
        if self.ids(field):
            return [field]
        parts = re.split(r"([;,|])", field) if re.search(r"[;,|]", field) else re.split(r"(\s+)", field)
        tags: list[str] = []
        at = 0
        while at < len(parts):
            ends = range(min(len(parts), at + 2 * self.most_words - 1), at, -1)  # parts and separators alternate
            end = next((end for end in ends if self.ids("".join(parts[at:end]).strip())), at + 1)
            tag = "".join(parts[at:end]).strip()
            tags += [tag] if tag else []
            at = end if end % 2 == 0 else end + 1
        return tags


def nearest(word: str, choices: Iterable[str], count: int = 1) -> list[str]:
    """The choices most like a name, compared as ``folded``."""
    by_fold: dict[str, str] = {}
    for choice in choices:
        by_fold.setdefault(folded(choice[:_LONGEST]), choice)
    return [by_fold[close] for close in difflib.get_close_matches(folded(word[:_LONGEST]), list(by_fold), count)]


def split_without_classes(
    fields: Sequence[Field], blanks: Blanks | None
) -> tuple[dict[Field, list[str]], list[str], str]:
    """Split all fields of a file before its classes are known.

    ';', ',' and '|' separate tags. A blank does only if each word of each tag that has blanks is a whole tag
    elsewhere: 'cat dog' beside 'cat' and 'dog' holds two tags, 'traffic light' is one.

    Args:
        blanks: whether blanks separate tags or belong to names, if the user says so.

    Returns:
        The tags of each field; the tags with blanks that may as well be several (``_doubtful``); and a remark if blanks
        had to be interpreted.
    """
    split = {field: [tidy(part) for part in re.split(f"[{SEPARATORS}]", field) if part.strip()] for field in fields}
    whole = {folded(part) for parts in split.values() for part in parts if len(part.split()) == 1}
    several = Counter(part for parts in split.values() for part in parts if len(part.split()) > 1)
    numbers = all(word.isdecimal() for part in several for word in part.split())
    if blanks is None and (numbers or all(whole.issuperset(_words(part)) for part in several)):
        blanks = "separate"
    if blanks == "separate":
        return {field: [tag for part in parts for tag in part.split()] for field, parts in split.items()}, [], ""
    if blanks == "belong":
        return split, [], ""
    if doubtful := _doubtful(several, whole):
        return split, doubtful, ""
    remark = f"blanks belong to class names, such as '{several.most_common(1)[0][0]}'; --blanks separate splits them"
    return split, [], remark


def _words(name: str) -> tuple[str, ...]:
    return tuple(map(folded, name.split()))


def _doubtful(several: Iterable[str], whole: set[str]) -> list[str]:
    """The names with blanks whose words recur as those of separate tags would.

    All words of such a name are whole tags elsewhere, or another name has the same words in another order. If more than
    half of all names consist of words that recur in other tags, these are doubtful too, provided that one of their
    words stands last, or alone, in one tag and before another word in a second: 'bird cat', 'bird dog', 'cat dog'. In
    real names words keep their places ('traffic light', 'street light', 'traffic sign', 'street sign'), or most names
    have a word of their own ('golden retriever', 'labrador retriever').

    Args:
        several: names with blanks.
        whole: folded names without.
    """
    by_words = {_words(name): name for name in several}
    orders = Counter(tuple(sorted(words)) for words in by_words)
    counts = Counter(word for words in by_words for word in set(words))
    recurring = [words for words in by_words if all(counts[word] > 1 or word in whole for word in words)]
    last = whole | {words[-1] for words in by_words}
    moving = {word for words in by_words for word in words[:-1]} & last
    mixed = recurring if 2 * len(recurring) > len(by_words) and any(moving & set(words) for words in recurring) else []
    return [
        name
        for words, name in by_words.items()
        if whole.issuperset(words) or orders[tuple(sorted(words))] > 1 or words in mixed
    ]
