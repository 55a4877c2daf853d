"""The rows that the papers' tables run, and the part of each row that a table scores."""

from collections.abc import Iterator
from dataclasses import replace

from pipeline.config import references
from pipeline.config.schema import Params
from pipeline.config.stage_table import SECTIONS
from pipeline.config.tables import PlannedTable


def faults(params: Params) -> Iterator[str]:
    """Yield a line for each row of a table that the params do not define."""
    rows = references.rows(params)
    for name, table in params.tables.items():
        if absent := [row for row in table.steps if row not in rows]:
            listed = ", ".join(absent)
            yield f"tables.{name}.rows: {listed}: no such row; add it (variants), or state the reason why it is not run"


def select(params: Params) -> Params:
    """Let the rows of the tables run: all of them, or those that ``rows`` names. Params without tables remain."""
    if not params.tables:
        return params
    every = dict.fromkeys(row for table in params.tables.values() for row in table.steps)
    rows = tuple(row for row in every if params.rows is None or row in params.rows)
    method = params.method if params.method in rows else next(iter(rows), params.method)
    return replace(params, rows=rows, first=(), method=method)


def trim(params: Params) -> Params:
    """Keep only the blocks that the tables score: a table of maps needs no segmentation networks.

    ``params`` has the blocks of the rows that run. Each table learns their ``chains``.
    """
    if not params.tables:
        return params
    chains = references.chains(params)
    tables = {
        name: PlannedTable(
            **vars(table),
            chains={
                row: {step: chains[row][step] for step in sorted(steps) if step in chains[row]}
                for row, steps in table.steps.items()
                if row in chains
            },
        )
        for name, table in params.tables.items()
    }
    ends = {reference for table in tables.values() for chain in table.chains.values() for reference in chain.values()}
    networks = references.rows(params)
    wanted = references.derived_from(
        params,
        [networks[end.partition("/")[2]] if end.startswith("predictions/") else end for end in sorted(ends)],
    )
    parts = {
        section: {name: block for name, block in getattr(params, section).items() if f"{section}/{name}" in wanted}
        for section in SECTIONS
    }
    return replace(params, tables=tables, **parts)  # type: ignore[arg-type]
