"""What the papers' tables cost before they run: the number of trainings, and how long such trainings took."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.stage_table import STAGES
from pipeline.stores import manifest
from pipeline.workflow.graph import Graph, Job

CORES = 2  # of the machine of ``MEASURED``; each trains one network with one thread


@dataclass(frozen=True)
class Measured:
    """Seconds that a training of each stage took, on a machine that is named (docs/RESULTS.md)."""

    machine: str
    seconds: Mapping[str, float]


# By experiment: demo, the means of the run that scored its rows (docs/RESULTS.md); voc12_mini, the classifier base, and
# the segmentation of docs/TRIALS.md for 1,000 images in place of 800
MEASURED = {
    "demo": Measured(
        "two cores of an AMD EPYC with AVX-512",
        {"classifier": 27.4, "segmentation": 28.0, "one_step": 53.0, "refinement": 14.5, "affinity": 10.0},
    ),
    "voc12_mini": Measured("two cores of an AMD EPYC with AVX-512", {"classifier": 252.0, "segmentation": 528.0}),
}


def trainings(jobs: Sequence[Job]) -> Counter[str]:
    """Count the trainings among the jobs by stage."""
    return Counter(job.stage for job in jobs if STAGES[job.stage].trains)


def announcement(graph: Graph, outdated: Sequence[Job]) -> Iterator[str]:
    """Yield the lines to print before the tables of the params run; none if there are no tables."""
    if not graph.params.tables:
        return
    every, due = trainings(graph.jobs), trainings(outdated)
    names = ", ".join(graph.params.tables)
    yield f"tables {names}: {_listed(every)}; {due.total() or 'none'} of them to be run"
    if due:
        yield _duration(graph, outdated, due)


def _duration(graph: Graph, outdated: Sequence[Job], due: Counter[str]) -> str:
    """Say how long the trainings that are due took before: here, or on the machine of ``MEASURED``."""
    finished = _finished(graph, outdated)
    known = MEASURED.get(graph.params.experiment)
    seconds = {stage: sum(took) / len(took) for stage, took in finished.items()}
    origin = "as long as the finished ones here took"
    if not due.keys() <= seconds.keys():
        seconds = dict(known.seconds) if known else seconds
        origin = f"as long as on {known.machine} (docs/RESULTS.md)" if known else origin
    counted = {stage: number for stage, number in due.items() if stage in seconds}
    if not counted:
        return f"no training of {graph.params.experiment} has been timed"
    whole = sum(number * seconds[stage] for stage, number in counted.items())
    untimed = due - Counter(counted)
    rest = f"; {_listed(untimed)} not included, since none was timed" if untimed else ""
    time = f"about {whole / 60:.0f} min of one core, or {whole / 60 / CORES:.0f} min on {CORES} cores"
    return f"{time}, if each takes {origin}{rest}"


def _finished(graph: Graph, outdated: Sequence[Job]) -> dict[str, list[float]]:
    """Return the seconds of the up-to-date trainings by stage."""
    took: dict[str, list[float]] = {}
    stale = {job.label for job in outdated}
    for job in graph.jobs:
        if STAGES[job.stage].trains and job.label not in stale and (record := manifest.read(job.folder)):
            took.setdefault(job.stage, []).append(float(record["seconds"]))
    return took


def _listed(counts: Counter[str]) -> str:
    """Such as '12 trainings (5 classifier, 7 segmentation)'."""
    parts = ", ".join(f"{number} {stage}" for stage, number in counts.items())
    plural = "" if counts.total() == 1 else "s"
    return f"{counts.total()} training{plural}" + (f" ({parts})" if parts else "")
