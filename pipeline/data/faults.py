"""Collecting faults, so that a person sees all of them at once and none of them a thousand times."""

import difflib
from collections.abc import Iterable

from pipeline.errors import PipelineError

LIMIT = 20


def hint(word: str, choices: Iterable[str], otherwise: str) -> str:
    """The mend of a wrong name: the choice that it is most like, or ``otherwise`` where it is like none."""
    close = difflib.get_close_matches(word, list(choices), 1)
    return f"did you mean {close[0]}?" if close else otherwise


class Faults:
    """Fault lines by kind; of each kind the first ``LIMIT`` are kept, the others counted."""

    def __init__(self) -> None:
        self._kept: dict[str, list[str]] = {}
        self._left: dict[str, int] = {}

    def add(self, kind: str, line: str) -> None:
        """``line`` names the file and the mend; ``kind`` is what a count of such lines is called."""
        kept = self._kept.setdefault(kind, [])
        if len(kept) < LIMIT:
            kept.append(line)
        else:
            self._left[kind] = self._left.get(kind, 0) + 1

    def __len__(self) -> int:
        return sum(map(len, self._kept.values())) + sum(self._left.values())

    def lines(self) -> list[str]:
        """Kind by kind in the order in which each was first met."""
        out = []
        for kind, kept in self._kept.items():
            out += kept
            if kind in self._left:
                out.append(f"... and {self._left[kind]} more of this kind ({kind})")
        return out

    def check(self) -> None:
        """Raises PipelineError with all lines where there are any."""
        if self._kept:
            raise PipelineError(*self.lines())
