"""Jobs that no row that runs needs, and why: people may ask for them by name or by file."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.config import params as parameters
from pipeline.config.schema import Params
from pipeline.config.validation import reason_left_out
from pipeline.errors import PipelineError
from pipeline.workflow.graph import Graph, Job


@dataclass(frozen=True)
class LeftOut:
    """The jobs of params files that a graph of the same files lacks."""

    files: Sequence[Path]
    overrides: Mapping[str, Any]
    graph: Graph

    @cached_property
    def _params(self) -> Params:
        return parameters.load(self.files, self.overrides, every_row=True)

    @cached_property
    def jobs(self) -> list[Job]:
        """The jobs, in topological order."""
        run = {job.label for job in self.graph.jobs}
        return [job for job in Graph(self._params).jobs if job.label not in run]

    def line(self, job: Job) -> str:
        """Return a line that names the job, the rows that need it, why they are left out, and the fix."""
        reference = f"{job.section}/{job.name.rpartition('/')[2]}"
        return f"{job.label} is left out: {reason_left_out(self._params, reference)}"

    def find(self, stage: str, name: str) -> Job:
        """Return the job of a stage in the graph.

        Raises:
            PipelineError: it is left out, or there is none.
        """
        try:
            return self.graph.find(stage, name)
        except PipelineError:
            for job in self.jobs:
                if (job.stage, job.full_name) == (stage, name):
                    raise PipelineError(self.line(job)) from None
            raise

    def requested(self, path: str) -> str | None:
        """Return the line on the job that would write a file; None if it is not left out."""
        return next((self.line(job) for job in self.jobs if Path(os.path.normpath(path)) in job.files), None)
