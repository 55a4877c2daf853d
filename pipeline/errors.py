"""The exception that is reported to the user without a traceback."""

from typing import Any


def one_line(text: str) -> str:
    """Escape characters that do not print, such as line breaks and lone surrogates in user-supplied names."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class PipelineError(Exception):
    """A fault in the input that the user can fix.

    Each argument is one line that names the file or key, the fault and the fix. A stage prints each line as
    ``error: ...`` and exits with status 1. Any other exception is a bug and shows its traceback.
    """

    def __init__(self, *lines: str) -> None:
        self.lines = tuple(map(one_line, lines))
        super().__init__("\n".join(self.lines))

    def __reduce__(self) -> tuple[Any, ...]:
        return PipelineError, self.lines  # a worker's error keeps its lines
