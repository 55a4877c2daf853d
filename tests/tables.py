"""What tests of the papers' tables share."""

from pipeline.config.schema import Params
from pipeline.config.tables import PlannedTable


def planned(params: Params, name: str) -> PlannedTable:
    table = params.tables[name]
    assert isinstance(table, PlannedTable)
    return table
