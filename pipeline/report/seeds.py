"""The same rows with several seeds: means and ranges of their scores, and the orderings on which the seeds agree.

The first seed is ``seed`` of params.yaml. Its scores alone are the metrics of an experiment with one seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from pipeline.report.describe import Logs
from pipeline.report.metrics import INTERVAL, Chains, Metrics, Scores, collect, supervision

RANKED = {  # key of a score -> the title of its ranking
    "miou": "Final mIoU of the segmentation",
    "labels_miou_ignored_as_background": "mIoU+ of the pseudo labels",
    "maps_best_threshold_miou": "mIoU* of the maps",
}


@dataclass(frozen=True)
class Run:
    """The scores and training logs of one seed, by reference, and its metrics by row (or block: ``report.boxes``)."""

    scores: Scores
    logs: Logs
    metrics: Metrics


Runs = Mapping[int, Run]  # by seed


class Range(NamedTuple):
    """The least and the greatest value over the seeds."""

    least: float
    most: float

    def __str__(self) -> str:
        """In percent."""
        return f"{100 * self.least:.1f}–{100 * self.most:.1f}"


Ranges = Mapping[str, Mapping[str, Range]]  # by row and key


@dataclass(frozen=True)
class Ranked:
    """A row of a ranking. ``undecided`` holds lower rows, and the number of seeds in which this row is above each."""

    name: str
    supervision: str
    values: Sequence[str]  # by seed, in percent
    mean: str
    range: Range
    undecided: Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Ranking:
    """Rows in descending order of the mean of a score. A row is above all lower ones in every seed but for some."""

    title: str
    seeds: Sequence[int]
    rows: Sequence[Ranked]


def split(seeds: Sequence[int], rows: Chains, scores: Scores, logs: Logs) -> Runs:
    """Split scores and logs by seed. The references of all seeds but the first start with 'seed_N/'."""
    prefixes = {seed: f"seed_{seed}/" if number else "" for number, seed in enumerate(seeds)}
    further = tuple(filter(None, prefixes.values()))

    def select(entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        if not prefix:
            return {name: entry for name, entry in entries.items() if not name.startswith(further)}
        return {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}

    runs = {}
    for seed, prefix in prefixes.items():
        own = select(scores, prefix)
        runs[seed] = Run(own, select(logs, prefix), collect(rows, own))
    return runs


def means(runs: Runs) -> Metrics:
    """Return the mean of each score over the seeds, or all metrics of the only seed."""
    first, *others = (run.metrics for run in runs.values())
    if not others:
        return first
    return {row: {key: _mean(values) for key, values in _values(runs, row).items()} for row in first}


def ranges(runs: Runs) -> Ranges:
    """Return the range of each score over the seeds; empty if there is only one."""
    if len(runs) == 1:
        return {}
    rows = next(iter(runs.values())).metrics
    return {row: {key: Range(min(v), max(v)) for key, v in _values(runs, row).items()} for row in rows}


def table(runs: Runs) -> dict[str, dict[str, Any]]:
    """Return the content of metrics.json: each row's means and, for several seeds, ranges and each seed's metrics."""
    content: dict[str, dict[str, Any]] = {row: dict(values) for row, values in means(runs).items()}
    for row, spread in ranges(runs).items():
        content[row]["least"] = {key: value.least for key, value in spread.items()}
        content[row]["most"] = {key: value.most for key, value in spread.items()}
        content[row]["seeds"] = {str(seed): run.metrics[row] for seed, run in runs.items()}
    return content


def headline(method: str, rows: Chains, runs: Runs) -> dict[str, Any]:
    """Return the entry of one row in ``table`` and its IoU by class, for the metrics.json in the project root."""
    found = [run.scores.get(rows[method]["predictions"], {}).get("iou", {}) for run in runs.values()]
    values = {name: [iou[name] for iou in found if iou.get(name) is not None] for name in found[0]}
    return {"method": method, **table(runs)[method], "iou": {name: _mean(v) for name, v in values.items() if v}}


def rankings(rows: Chains, runs: Runs) -> list[Ranking]:
    """Rank the rows by each score of ``RANKED``; empty if there is only one seed."""
    drawn = [_ranking(title, key, rows, runs) for key, title in RANKED.items()] if len(runs) > 1 else []
    return [ranking for ranking in drawn if len(ranking.rows) > 1]


def _ranking(title: str, key: str, rows: Chains, runs: Runs) -> Ranking:
    scored = {row: [run.metrics[row].get(key) for run in runs.values()] for row in rows}
    values = {row: [v for v in found if v is not None] for row, found in scored.items() if None not in found}
    order = sorted(values, key=lambda row: -fmean(values[row]))
    ranked = []
    for place, row in enumerate(order):
        above = {
            other: sum(a > b for a, b in zip(values[row], values[other], strict=True)) for other in order[place + 1 :]
        }
        ranked.append(
            Ranked(
                row,
                supervision(rows[row]),
                [f"{100 * value:.1f}" for value in values[row]],
                f"{100 * fmean(values[row]):.1f}",
                Range(min(values[row]), max(values[row])),
                [(other, count) for other, count in above.items() if count < len(runs)],
            )
        )
    return Ranking(title, list(runs), ranked)


def _mean(values: Sequence[float]) -> float:
    return round(fmean(values), 6)  # as many digits as the scores have


def _values(runs: Runs, row: str) -> dict[str, list[float]]:
    """Return the values of each score of a row over the seeds that have it. Intervals have no mean."""
    found: dict[str, list[float]] = {}
    for run in runs.values():
        for key, value in run.metrics[row].items():
            if key not in INTERVAL:
                found.setdefault(key, []).append(value)
    return found
