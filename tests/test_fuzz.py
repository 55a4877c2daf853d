"""A few damaged files for every reader of user-supplied files; ``python -m tests.fuzz`` runs thousands."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests import fuzz

CASES = 60


@pytest.mark.parametrize("name", fuzz.names())
def test_damaged_files_are_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    reader = fuzz.reader(name, tmp_path)
    outcomes = set()

    @settings(
        max_examples=CASES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(reader.cases)
    def run(case: fuzz.Case) -> None:
        outcomes.add(fuzz.check(reader, tmp_path, reader.damaged(case)))

    assert {fuzz.check(reader, tmp_path, seed) for seed in reader.seeds} == {"read"}
    run()
    assert name == "manifest" or "refused" in outcomes  # a damaged manifest counts as none
