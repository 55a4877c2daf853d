"""A paper's table as the paper prints it, with our figures beside the published ones, and the outcome of each claim."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pipeline.config.tables import PAPERS, Claim, PlannedTable, Score, step
from pipeline.report.charts import LineChart, line_chart
from pipeline.report.metrics import COLUMNS, Scores

NOT_RUN = "–"
Figures = dict[str, dict[str, float]]  # row -> column -> figure in percent; what was not measured is left out


@dataclass(frozen=True)
class Cell:
    """A cell of the printed table; ``kind``: head, text, published, measured or missing."""

    text: str
    kind: str
    note: str = ""  # in small print after the text


@dataclass(frozen=True)
class Outcome:
    """The outcome of a claim: in how many of the seeds it holds. None of them measured it if ``seeds`` is 0."""

    claim: Claim
    holds: int
    seeds: int
    figures: str  # of the first seed

    @property
    def verdict(self) -> str:
        """Such as 'holds', 'does not hold', 'holds in 2 of 3 seeds' or 'not measured'."""
        if not self.seeds:
            return "not measured"
        if self.seeds > 1:
            return f"holds in {self.holds} of {self.seeds} seeds"
        return "holds" if self.holds else "does not hold"


def measured(table: PlannedTable, scores: Scores) -> Figures:
    """Return the figures of the table's rows of one seed, in percent."""
    figures: Figures = {}
    for row in table.measured:
        values = {column: _cell(table, row, column, scores) for column in table.columns}
        figures[row] = {column: 100 * value for column, value in values.items() if value is not None}
    return figures


def _cell(table: PlannedTable, row: str, column: str, scores: Scores) -> float | None:
    """Return the figure of a cell in [0, 1]; None if it was not measured."""
    if (source := table.source(row, column)) is None:
        return None
    name, score = source
    return _value(scores.get(table.chains.get(name, {}).get(step(score), ""), {}), score)


def _value(scores: Mapping[str, Any], score: Score) -> float | None:
    """Return a score from the scores of the step that has it; None if it was not measured."""
    if score.startswith("coverage_"):
        by_epoch = [value for value in scores.get("coverage_by_epoch", {}).get("coverage", []) if value is not None]
        places = {"coverage_first": 0, "coverage_half": (len(by_epoch) - 1) // 2, "coverage_last": -1}
        return by_epoch[places[score]] if by_epoch else None
    return scores.get(next(column.score for column in COLUMNS if column.key == score))


def per_class(table: PlannedTable, scores: Scores, classes: Sequence[str]) -> Figures:
    """Return the figures of each class, in percent, by row; the first column of the table says which."""
    if not table.per_class:
        return {}
    figures: Figures = {}
    for row in table.measured:
        if (source := table.source(row, next(iter(table.columns)))) is not None:
            name, score = source
            key = next(column.score for column in COLUMNS if column.key == score)
            values = scores.get(table.chains.get(name, {}).get(step(score), ""), {}).get(f"{key}_per_class", {})
            figures[row] = {name: 100 * values[name] for name in classes if values.get(name) is not None}
    return figures


def outcomes(table: PlannedTable, seeds: Sequence[Figures]) -> list[Outcome]:
    """Return the outcome of each claim over the figures of all seeds.

    Rows that are equal to the last digit are the same network, such as one with fewer layers than the paper's. They
    do not test a claim that rows are close.
    """
    found = []
    for claim in table.claims:
        checks = (check(claim, table.measured, figures) for figures in seeds if not _are_one(claim, figures))
        tested = [test for test in checks if test is not None]
        found.append(Outcome(claim, sum(holds for holds, _ in tested), len(tested), tested[0][1] if tested else ""))
    return found


def _are_one(claim: Claim, figures: Figures) -> bool:
    """Whether two of the rows that should be close have the same figure."""
    rows, column = claim.within or (), claim.column or ""
    return len({figures.get(row, {}).get(column) for row in rows}) < len(rows)


def check(claim: Claim, rows: Sequence[str], figures: Figures) -> tuple[bool, str] | None:
    """Return whether a claim holds and the figures that decide it; None if one of these was not measured."""
    if row := claim.rising or claim.slowing:
        return _over_columns(claim, list(figures.get(row, {}).items()))
    assert claim.column is not None
    named = list(rows) if claim.best else list(claim.rows)
    values = {row: figures[row][claim.column] for row in named if claim.column in figures.get(row, {})}
    if len(values) < len(named):
        return None
    listed = ", ".join(f"{row} {value:.1f}" for row, value in values.items())
    if claim.within:
        spread = max(values.values()) - min(values.values())
        return spread <= claim.by + 1e-9, f"{listed}: they differ by {spread:.1f}"
    if claim.best:
        others = {row: value for row, value in values.items() if row != claim.best}
        rival = max(others, key=lambda row: others[row])
        ahead = values[claim.best] - others[rival]
        text = (
            f"{claim.best} {values[claim.best]:.1f}, the best other is {rival} with {others[rival]:.1f}: {ahead:+.1f}"
        )
        return _gains(claim, ahead), text
    steps = [values[higher] - values[lower] for higher, lower in pairwise(named)]
    text = f"{listed}: {', '.join(f'{gain:+.1f}' for gain in steps)}"
    return all(_gains(claim, gain) for gain in steps), text


def _gains(claim: Claim, gain: float) -> bool:
    return gain >= claim.by - 1e-9 and (gain > 0 or claim.by < 0)


def _over_columns(claim: Claim, figures: Sequence[tuple[str, float]]) -> tuple[bool, str] | None:
    """Check a claim on the figures of a row, by column in the table's order."""
    if len(figures) < 2 + (claim.slowing is not None):
        return None
    gains = [after - before for (_, before), (_, after) in pairwise(figures)]
    listed = ", ".join(f"{column} {value:.1f}" for column, value in figures)
    text = f"{listed}: {', '.join(f'{gain:+.1f}' for gain in gains)}"
    if claim.rising:
        return all(gain > 0 for gain in gains), text
    return all(later < earlier for earlier, later in pairwise(gains)), text


def grid(table: PlannedTable, seeds: Sequence[Figures]) -> list[list[Cell]]:
    """Lay out the table: a heading, then its rows, each column once as published and once as measured.

    With several seeds, a cell shows their mean and, in small print, the lowest and the highest figure.
    """
    decimals = _decimals(table)
    printed = {key for row in table.rows.values() for key in row.published}
    scored = {key for name in table.rows for key in table.columns if table.source(name, key) is not None}
    heading = [Cell("row", "head"), *(Cell(name, "head") for name in table.head)]
    for key, column in table.columns.items():
        kinds = [note for note, used in (("published", key in printed), ("measured here", key in scored)) if used]
        heading += [Cell(column.title or key, "head", kind) for kind in kinds]
    body = [heading]
    for name, row in table.rows.items():
        cells = [Cell("" if row.reason else name, "text"), *(Cell(text, "text") for text in row.text)]
        for key in table.columns:
            if key in printed:
                cells.append(_published(row.published.get(key), decimals))
            if key in scored:
                cells.append(_measured([figures[name][key] for figures in seeds if key in figures.get(name, {})]))
        body.append(cells)
    return [list(column) for column in zip(*body, strict=True)] if table.across else body


def class_grid(table: PlannedTable, here: Figures, classes: Sequence[str]) -> list[list[Cell]]:
    """Lay out a table by class: for each row a line of published figures and a line of measured ones."""
    decimals = _decimals(table)
    first, column = next(iter(table.columns.items()))
    body = [
        [Cell("row", "head"), Cell("", "head"), *(Cell(name, "head") for name in (*classes, column.title or first))]
    ]
    for name, row in table.rows.items():
        printed = [_published(row.published.get(key), decimals) for key in (*classes, first)]
        body.append([Cell(row.text[0], "text"), Cell("published", "text"), *printed])
        own = [_measured([here[name][key]] if key in here.get(name, {}) else []) for key in (*classes, first)]
        body.append([Cell(name, "text"), Cell("measured here", "text"), *own])
    return body


def coverage(table: PlannedTable, scores: Scores) -> LineChart | None:
    """Draw the share of object pixels that attention has discovered by epoch (OAA Fig. 11), if the table scores it."""
    lines = {}
    for row, chain in table.chains.items():
        by_epoch = scores.get(chain.get("maps", ""), {}).get("coverage_by_epoch", {})
        points = zip(by_epoch.get("epoch", []), by_epoch.get("coverage", []), strict=True)
        lines[row] = [(x, 100 * y) for x, y in points if y is not None]
    scored = any((column.score or "").startswith("coverage_") for column in table.columns.values())
    title = "Share of object pixels that cumulative attention has discovered"
    return line_chart(title, "epoch", "coverage (%)", lines) if scored else None


def _decimals(table: PlannedTable) -> int:
    """The most decimals of a published figure of the table, with which all of them are printed."""
    figures = (figure for row in table.rows.values() for figure in row.published.values())
    return max((len(f"{figure:g}".partition(".")[2]) for figure in figures), default=0)


def _published(value: float | None, decimals: int) -> Cell:
    return Cell(NOT_RUN, "missing") if value is None else Cell(f"{value:.{decimals}f}", "published")


def _measured(values: Sequence[float]) -> Cell:
    if not values:
        return Cell(NOT_RUN, "missing")
    spread = f"{min(values):.1f} to {max(values):.1f}" if len(values) > 1 else ""
    return Cell(f"{sum(values) / len(values):.1f}", "measured", spread)


def label(table: PlannedTable) -> str:
    """The table's name, such as 'OAA Table 4'."""
    return f"{table.paper} {table.number}"


def source(table: PlannedTable) -> str:
    """The paper and the table's number in it."""
    return f"{PAPERS[table.paper]}, {table.number}"


def text(table: PlannedTable, cells: Sequence[Sequence[Cell]], found: Sequence[Outcome]) -> str:
    """Format the table and the outcomes of its claims as plain text."""
    words = [[f"{cell.text} ({cell.note})" if cell.note else cell.text for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*words, strict=True)]
    lines = [f"{label(table)}: {table.title}"]
    lines += ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in words]
    for outcome in found:
        figures = f" ({outcome.figures})" if outcome.figures else ""
        lines.append(f"{outcome.verdict}: {outcome.claim.text}{figures}")
    return "\n".join(lines)


def record(table: PlannedTable, seeds: Mapping[int, Figures], found: Sequence[Outcome]) -> dict[str, Any]:
    """The figures and outcomes as JSON types, for table.json."""
    return {
        "table": label(table),
        "figures": {
            str(seed): {row: {key: round(value, 4) for key, value in values.items()} for row, values in figures.items()}
            for seed, figures in seeds.items()
        },
        "claims": [
            {"claim": one.claim.text, "holds": one.holds, "seeds": one.seeds, "figures": one.figures} for one in found
        ],
    }
