"""The JSON files that a report reads: scores, and logs of trainings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError


def read_json(inputs: Mapping[str, Path], prefix: str) -> dict[str, Any]:
    """Read the JSON inputs whose names start with ``prefix``, keyed by the rest of the name.

    Raises:
        PipelineError: inputs are not JSON; it has one line for each.
    """
    contents, faults = {}, []
    for name, path in inputs.items():
        if name.startswith(prefix):
            try:
                contents[name.removeprefix(prefix)] = json.loads(path.read_text())
            except (OSError, ValueError) as error:
                faults.append(f"{path}: not JSON ({error}); run its stage again")
    if faults:
        raise PipelineError(*faults)
    return contents
