"""The schema of the papers' tables: their rows, columns and published figures, and the claims drawn from them.

A profile in profiles/tables holds one table, and the variants that are its rows (``pipeline.config.variants``).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipeline.config.reader import Range, did_you_mean

# Scores of a row. The first ones are the keys of metrics.json. Coverage is the share of object pixels that cumulative
# attention has discovered (OAA Fig. 11) after the first accumulated epoch, after half of them, and after the last.
Score = Literal[
    "maps_recall",
    "maps_noise",
    "maps_best_threshold_miou",
    "labels_miou",
    "labels_ignored",
    "labels_miou_ignored_as_background",
    "miou",
    "pixel_accuracy",
    "coverage_first",
    "coverage_half",
    "coverage_last",
]
Percent = Annotated[float, Range(least=0, most=100)]
PAPERS = {
    "OAA": "Jiang et al., Online Attention Accumulation",
    "DRS": "Kim et al., Discriminative Region Suppression",
    "AMR": "Qin et al., Activation Modulation and Recalibration",
    "EDAM": "Wu et al., Embedded Discriminative Attention Mechanism",
    "AGEN": "Zhang et al., Attention Guided Enhancement Network",
}
KINDS = ("above", "best", "within", "rising", "slowing")  # of claims


def step(score: Score) -> str:
    """Return the step of a row (one of STEPS) whose output has this score."""
    kind = score.partition("_")[0]
    return {"maps": "maps", "coverage": "maps", "labels": "labels"}.get(kind, "predictions")


@dataclass(frozen=True)
class Column:
    """A column of figures. Without ``score`` it holds published figures alone, since nothing here measures them."""

    score: Score | None = None
    title: str | None = None  # the heading; null: the column's name


@dataclass(frozen=True)
class TableRow:
    """A row of the table, named after the row of params.yaml that measures it."""

    text: tuple[str, ...]  # one entry for each of the table's ``head``
    published: dict[str, Percent] = field(default_factory=dict)  # in percent, by column
    scores: dict[str, Score] = field(default_factory=dict)  # by column, where it is not the column's own score
    rows: dict[str, str] = field(default_factory=dict)  # by column, where another row of params.yaml measures it
    reason: str | None = None  # why no row of params.yaml measures it; its name is then free


@dataclass(frozen=True)
class Claim:
    """A claim that the paper draws from the table: exactly one of KINDS."""

    text: str  # in the paper's terms
    column: str | None = None  # of the figures that it compares; for all kinds but ``rising`` and ``slowing``
    above: tuple[str, ...] | None = None  # each of these rows is above the next by at least ``by``
    best: str | None = None  # this row is the highest of the table
    within: tuple[str, ...] | None = None  # the highest and the lowest of these rows differ by at most ``by``
    rising: str | None = None  # the figures of this row rise from each column to the next
    slowing: str | None = None  # and each rise is smaller than the one before
    by: Annotated[float, Range(least=-100, most=100)] = 0.0  # percentage points; below 0 it is a tolerance

    @property
    def rows(self) -> tuple[str, ...]:
        """The rows that the claim names."""
        single = (self.best, self.rising, self.slowing)
        return self.above or self.within or tuple(row for row in single if row is not None)

    def faults(self) -> Iterator[str]:
        kinds = {key: getattr(self, key) for key in KINDS}
        if sum(value is not None for value in kinds.values()) != 1:
            yield f": set exactly one of {', '.join(kinds)}"
        elif (self.column is None) != (self.rising is not None or self.slowing is not None):
            yield "column: must be set for above, best and within, and for these alone"
        for key in ("above", "within"):
            if kinds[key] is not None and len(kinds[key]) < 2:
                yield f"{key}: must name at least two rows"


@dataclass(frozen=True)
class Table:
    """A table of a paper. Its rows run, up to the steps that its columns score, instead of ``rows``."""

    paper: Literal["OAA", "DRS", "AMR", "EDAM", "AGEN"]
    number: str  # such as 'Table 4' or 'Fig. 11'
    title: str
    published_on: str  # the data, networks and test of the published figures
    head: tuple[str, ...]  # headings of the columns of text
    columns: dict[str, Column]
    rows: dict[str, TableRow]
    claims: tuple[Claim, ...] = ()
    per_class: bool = False  # add a column for each class, with the first column's score of that class
    across: bool = False  # the paper prints the rows side by side
    note: str | None = None  # in what the rows differ from the paper's

    @property
    def measured(self) -> tuple[str, ...]:
        """The names of the table's rows that params.yaml can measure."""
        return tuple(name for name, row in self.rows.items() if row.reason is None)

    def source(self, row: str, column: str) -> tuple[str, Score] | None:
        """Return the row of params.yaml that measures a cell, and its score; None if nothing measures it."""
        entry = self.rows[row]
        score = entry.scores.get(column, self.columns[column].score)
        return None if entry.reason or score is None else (entry.rows.get(column, row), score)

    @property
    def steps(self) -> dict[str, set[str]]:
        """The steps that the table scores of each row of params.yaml."""
        found: dict[str, set[str]] = {}
        for row in self.rows:
            for column in self.columns:
                if (source := self.source(row, column)) is not None:
                    found.setdefault(source[0], set()).add(step(source[1]))
        return found

    def faults(self) -> Iterator[str]:
        if not self.columns or not self.measured:
            yield f"{'rows' if self.columns else 'columns'}: is empty"
        for name, row in self.rows.items():
            if len(row.text) != len(self.head):
                yield f"rows.{name}.text: has {len(row.text)} entries, but head has {len(self.head)}"
            known = {*row.scores, *row.rows, *(() if self.per_class else row.published)}
            for column in sorted(known - set(self.columns)):
                yield f"rows.{name}: no column is named {column}{did_you_mean(column, self.columns)}"
        for number, claim in enumerate(self.claims):
            if claim.column is not None and claim.column not in self.columns:
                yield f"claims[{number}].column: no column is named {claim.column}"
            for row_name in claim.rows:
                if row_name not in self.measured:
                    fix = did_you_mean(row_name, self.measured)
                    yield f"claims[{number}]: {row_name} is no measured row of the table{fix}"


@dataclass(frozen=True)
class PlannedTable(Table):
    """A table of a run: ``chains`` maps each row of params.yaml that runs to the references of the steps it scores."""

    chains: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
