"""Collection of input faults, so that users see all of them at once but no kind thousands of times."""

import difflib
from collections.abc import Iterable

from pipeline.errors import PipelineError, one_line

LIMIT = 20
LENGTH = 500


def hint(word: str, choices: Iterable[str], otherwise: str) -> str:
    """Suggest a fix for a wrong name: the most similar choice, or ``otherwise`` if none is similar."""
    close = difflib.get_close_matches(word[:LENGTH], list(choices), 1)
    return f"did you mean {close[0]}?" if close else otherwise


def shortened(line: str) -> str:
    """Shorten a line to about ``LENGTH`` characters. Its start, which names the file, and its end, the fix, remain."""
    return line if len(line) <= LENGTH else f"{line[: LENGTH // 2]} ... {line[-LENGTH // 2 :]}"


class Faults:
    """Fault lines by kind: the first ``LIMIT`` of each kind are stored, the others only counted."""

    def __init__(self) -> None:
        self._kept: dict[str, list[str]] = {}
        self._omitted: dict[str, int] = {}

    def add(self, kind: str, line: str) -> None:
        """Add a fault.

        Args:
            kind: name of this kind of fault, shown with the count of omitted lines.
            line: the message, which names the file and the fix. It is ``shortened``.
        """
        kept = self._kept.setdefault(kind, [])
        if len(kept) < LIMIT:
            kept.append(one_line(shortened(line)))
        else:
            self._omitted[kind] = self._omitted.get(kind, 0) + 1

    def __len__(self) -> int:
        return sum(map(len, self._kept.values())) + sum(self._omitted.values())

    def lines(self) -> list[str]:
        """All lines, grouped by kind in order of first occurrence."""
        out = []
        for kind, kept in self._kept.items():
            out += kept
            if kind in self._omitted:
                out.append(f"... and {self._omitted[kind]} more of this kind ({kind})")
        return out

    def check(self) -> None:
        """Raise PipelineError with all lines if there are any."""
        if self._kept:
            raise PipelineError(*self.lines())
