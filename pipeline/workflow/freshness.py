"""Which jobs are up to date.

The manifest next to a job's outputs records the inputs, parameters and code that produced them. The job is up to date
if they are unchanged.
"""

import os
from pathlib import Path
from typing import Any

from pipeline.stores import kept, manifest
from pipeline.stores.hashes import fingerprint
from pipeline.workflow.graph import Graph, Job


def _record(job: Job) -> dict[str, Any] | None:
    """Return the manifest of a job if its outputs exist and it records the current parameters and code."""
    record = manifest.read(job.folder)
    if record is None or record["stage"] != job.label or not all(map(os.path.exists, job.outputs.values())):
        return None
    if not all(isinstance(record["outputs"].get(job.key(path)), str) for path in job.outputs.values()):
        return None  # no reader would accept them
    return record if record["code"] == job.code and record["params"] == job.params else None


def is_fresh(job: Job, hashes: dict[Path, str]) -> bool:
    """Return whether the outputs of a job exist and its manifest records the current inputs, parameters and code.

    ``hashes`` caches the hashes of inputs. The hashes of outputs are read from their manifests, except those of leaves.
    """
    record = _record(job)
    if record is None:
        return False
    try:
        for key, path in job.inputs.items():
            if path not in hashes:
                producer = manifest.read(path.parent)
                recorded = producer["outputs"].get(path.name) if producer and os.path.exists(path) else None
                hashes[path] = recorded or job.fingerprint(key)
            if record["inputs"].get(key) != hashes[path]:
                return False
        return all(record["outputs"].get(job.key(path)) == fingerprint(path) for path in job.leaves)
    except OSError:  # a file is missing or cannot be read
        return False


def stale(graph: Graph) -> list[Job]:
    """Return the jobs that are not up to date and all jobs downstream of them, in topological order."""
    jobs: list[Job] = []
    rewritten: set[Path] = set()
    hashes: dict[Path, str] = {}
    for job in graph.jobs:
        if rewritten.intersection(job.inputs.values()) or not is_fresh(job, hashes):
            jobs.append(job)
            rewritten.update(job.outputs.values())
    return jobs


def keep_outputs(jobs: list[Job]) -> None:
    """Keep the outputs of those stale jobs that may turn out to be up to date, once the jobs before them have run.

    These are all whose parameters and code are unchanged. Their inputs do not count: they may be missing after a run
    that failed, and the next run may write them again as they were. The report is left out, since it shares an output
    with other experiments and takes little time.
    """
    for job in jobs:
        if all(path.parent == job.folder for path in job.files) and _record(job):
            kept.keep(job.files)
        elif any(map(os.path.exists, job.files)):  # otherwise a run was killed before the stage could restore them
            kept.drop(job.files)
