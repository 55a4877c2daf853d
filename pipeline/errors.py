"""The one exception that a person is meant to read."""


class PipelineError(Exception):
    """A fault in the input that the user can mend.

    Each argument is one line: what is wrong, in which file, and the mend. A stage prints them as
    ``error: ...`` and exits with status 1; anything else that is raised is a bug and shows its traceback.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
