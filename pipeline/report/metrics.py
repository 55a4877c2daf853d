"""Scores of an experiment's rows, for metrics.json and for the table that is printed to the terminal."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.stage_table import KINDS

Scores = Mapping[str, Mapping[str, Any]]  # scores.json of each store by reference
Chains = Mapping[str, Mapping[str, str]]  # references of maps, labels (where they exist) and predictions by row
Metrics = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Column:
    """A column of the table, which shows ``score`` of the row's ``step``.

    ``better``: 1 if higher is better, -1 if lower is, 0 if neither.
    """

    key: str
    step: str
    score: str
    title: str
    better: int


COLUMNS = (
    Column("maps_recall", "maps", "recall", "recall", 1),
    Column("maps_noise", "maps", "noise", "noise", -1),
    Column("maps_best_threshold_miou", "maps", "best_threshold_miou", "mIoU*", 1),
    Column("labels_miou", "labels", "miou", "mIoU", 1),
    Column("labels_ignored", "labels", "ignored", "ignored", 0),
    Column("labels_miou_ignored_as_background", "labels", "miou_ignored_as_background", "mIoU+", 1),
    Column("miou", "predictions", "miou", "mIoU", 1),
    Column("pixel_accuracy", "predictions", "pixel_accuracy", "accuracy", 1),
)
INTERVAL = ("miou_low", "miou_high")
STEPS = {step: kind.title for step, kind in KINDS.items()}
CELL = 10  # width of a number in the text table, in characters


def supervision(chain: Mapping[str, str]) -> str:
    """Supervision of a row: 'weak' (tags only), 'mixed' (some masks) or 'full' (all masks; the upper bound)."""
    labels = chain.get("labels", "")  # a one-step network has none
    if labels == "ground_truth":
        return "full"
    return "mixed" if labels.startswith("mixtures/") else "weak"


def collect(rows: Chains, scores: Scores) -> Metrics:
    """Collect the scores of every row, in [0, 1]; missing scores are omitted. INTERVAL bounds the final mIoU."""
    metrics: Metrics = {}
    for row, chain in rows.items():
        values = {column.key: scores.get(chain.get(column.step, ""), {}).get(column.score) for column in COLUMNS}
        values |= {key: scores.get(chain.get("predictions", ""), {}).get(key) for key in INTERVAL}
        metrics[row] = {key: value for key, value in values.items() if value is not None}
    return metrics


def best(metrics: Metrics, rows: Chains) -> set[tuple[str, str]]:
    """(row, key) of the best weakly supervised rows, including ties; scores that only one row has are left out."""
    weak = [row for row in rows if supervision(rows[row]) == "weak"]
    out: set[tuple[str, str]] = set()
    for column in COLUMNS:
        values = {row: column.better * metrics[row][column.key] for row in weak if column.key in metrics[row]}
        if column.better and len(values) > 1:
            out |= {(row, column.key) for row, value in values.items() if value == max(values.values())}
    return out


def text_table(metrics: Metrics, rows: Chains, method: str, spread: Mapping[str, str] | None = None) -> str:
    """Format metrics as text in percent; '>' marks the selected method and '*' the best weakly supervised row.

    ``spread`` is the range of each row's final mIoU over several seeds, for a last column.
    """
    used = [column for column in COLUMNS if any(column.key in values for values in metrics.values())]
    if not used:
        return "no masks: nothing was scored"
    winners = best(metrics, rows)
    heading = "  method (%)"
    width = max(len(heading), *(len(row) + 2 for row in metrics))
    counts = {title: sum(column.step == step for column in used) for step, title in STEPS.items()}
    groups = "".join(
        f"   {title[: CELL * count - 4]:-<{CELL * count - 4}} " for title, count in counts.items() if count
    )
    lines = [" " * width + groups, heading.ljust(width) + "".join(f"{c.title:>{CELL - 1}} " for c in used)]
    if spread:
        lines[1] += f"{'mIoU over seeds':>{2 * CELL - 3}}"
    for row, values in metrics.items():
        line = f"{'>' if row == method else ' '} {row}".ljust(width)
        for column in used:
            number = f"{100 * values[column.key]:.1f}" if column.key in values else "-"
            line += f"{number:>{CELL - 1}}" + ("*" if (row, column.key) in winners else " ")
        if spread:
            line += f"{spread.get(row, '-'):>{2 * CELL - 3}}"
        lines.append(line)
    return "\n".join(line.rstrip() for line in lines)
