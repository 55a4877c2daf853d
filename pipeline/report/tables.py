"""Data of the report's tables, which templates/tables.html.j2 renders. Numbers are in percent with one decimal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.data import census
from pipeline.report.metrics import COLUMNS, INTERVAL, STEPS, Chains, Column, best, supervision
from pipeline.report.seeds import Range, Runs, means

BADGES = {"full": "upper bound", "mixed": "uses masks", "weak": ""}
MAX_HORIZONTAL = 9  # maximum number of horizontal class names in a table head; more are rotated


@dataclass(frozen=True)
class Number:
    """A score in a table; ``best`` is true for the best row that learned from tags only.

    If there are several seeds, ``text`` is their mean, ``range`` their range, and ``seeds`` their values.
    """

    text: str
    best: bool = False
    range: str = ""
    seeds: str = ""


@dataclass(frozen=True)
class MethodRow:
    """A row of the table of methods. ``groups`` contains its cells by column group."""

    name: str
    badges: Sequence[str]
    supervision: str
    groups: Sequence[Sequence[Number]]


@dataclass(frozen=True)
class ColumnGroup:
    """The columns of one step, and a description of the images on which they are scored."""

    title: str
    scored_on: str
    columns: Sequence[Column]


@dataclass(frozen=True)
class MethodsTable:
    """The table of methods, with all scores of all rows."""

    groups: Sequence[ColumnGroup]
    rows: Sequence[MethodRow]


@dataclass(frozen=True)
class HeatCell:
    """A number whose background has opacity ``strength``, in [0, 1]."""

    text: str
    strength: float
    diagonal: bool = False


@dataclass(frozen=True)
class HeatTable:
    """Coloured numbers by row and class. ``first`` is the heading of the column before the classes."""

    corner: str
    first: str
    names: Sequence[str]
    rows: Sequence[tuple[str, Sequence[HeatCell]]]

    @property
    def upright(self) -> bool:
        """Whether class names are rotated to save width."""
        return len(self.names) > MAX_HORIZONTAL


@dataclass(frozen=True)
class CensusTable:
    """The census by class. ``headings`` holds, for each group of columns, its title and the headings of its columns."""

    groups: Sequence[tuple[str, Sequence[str]]]
    rows: Sequence[tuple[str, Sequence[Sequence[str]]]]


def census_table(counted: census.Census) -> CensusTable:
    """Lay out the table that the index stage prints: a row for all images, then one for each class."""

    def split(cells: Sequence[str]) -> list[Sequence[str]]:
        parts, start = [], 0
        for _, span in census.GROUPS:
            parts.append(cells[start : start + span])
            start += span
        return parts[1:]

    titles = [title for title, _ in census.GROUPS[1:]]
    groups = list(zip(titles, split(census.HEADINGS), strict=True))
    return CensusTable(groups, [(row[0], split(row)) for row in counted.rows()])


def number(runs: Runs, row: str, key: str, text: str, best: bool = False) -> Number:
    """Add to the text of a mean, if there are several seeds, its range and each seed's value."""
    each = {seed: run.metrics[row][key] for seed, run in runs.items() if key in run.metrics[row]}
    if len(runs) == 1 or not each:
        return Number(text, best)
    shown = ", ".join(f"seed {seed}: {100 * value:.1f}" for seed, value in each.items())
    return Number(text, best, str(Range(min(each.values()), max(each.values()))), shown)


def methods_table(runs: Runs, rows: Chains, method: str, scored_on: Mapping[str, str]) -> MethodsTable:
    """Lay out the table of methods. ``scored_on`` describes the images on which each step was scored."""
    metrics = means(runs)
    winners = best(metrics, rows)
    groups = [
        ColumnGroup(title, scored_on[step], [column for column in COLUMNS if column.step == step])
        for step, title in STEPS.items()
    ]

    def cell(row: str, column: Column) -> Number:
        value = metrics[row].get(column.key)
        text = "–" if value is None else f"{100 * value:.1f}"
        if column.key == "miou" and all(key in metrics[row] for key in INTERVAL):
            text += " ({:.1f}–{:.1f})".format(*(100 * metrics[row][key] for key in INTERVAL))
        return number(runs, row, column.key, text, (row, column.key) in winners)

    body = []
    for row, chain in rows.items():
        kind = supervision(chain)
        badges = [badge for badge in (BADGES[kind], "selected" if row == method else "") if badge]
        body.append(MethodRow(row, badges, kind, [[cell(row, column) for column in g.columns] for g in groups]))
    return MethodsTable(groups, body)


def heat_table(
    corner: str, rows: Mapping[str, Mapping[str, float | None]], first: str, names: Sequence[str]
) -> HeatTable:
    """Lay out values in [0, 1] by row and class, coloured by value. Key '' of a row holds its mean."""

    def cell(value: float | None) -> HeatCell:
        return HeatCell("–", 0.0) if value is None else HeatCell(f"{100 * value:.1f}", 0.6 * value)

    body = [(row, [cell(values.get(name)) for name in ("", *names)]) for row, values in rows.items()]
    return HeatTable(corner, first, names, body)


def confusion_table(counts: Sequence[Sequence[int]], names: Sequence[str]) -> HeatTable:
    """Lay out pixel counts (ground truth x predicted) in percent per ground-truth class, blank below 0.5 %."""
    total = max(1, sum(map(sum, counts)))
    body = []
    for number, (name, row) in enumerate(zip(names, counts, strict=True)):
        cells = [HeatCell(f"{100 * sum(row) / total:.1f}", 0.0)]
        for column, count in enumerate(row):
            share = count / max(1, sum(row))
            shown = share >= 0.005
            cells.append(
                HeatCell(f"{100 * share:.0f}" if shown else "", 0.7 * share**0.5 if shown else 0.0, column == number)
            )
        body.append((name, cells))
    return HeatTable("Mask ↓ Predicted →", "share of all pixels", names, body)
