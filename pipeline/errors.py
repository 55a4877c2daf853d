"""The exception that is reported to the user without a traceback."""


class PipelineError(Exception):
    """A fault in the input that the user can fix.

    Each argument is one line that names the file or key, the fault and the fix. A stage prints each line as
    ``error: ...`` and exits with status 1. Any other exception is a bug and shows its traceback.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
