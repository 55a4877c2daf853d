"""The seconds of jobs by stage, from manifests."""

from pathlib import Path

from benchmarks.stages import seconds_by_stage
from pipeline.stores import manifest


def test_seconds_are_those_of_the_manifests_by_stage(tmp_path: Path) -> None:
    jobs = [("classifiers/a", "classifier a", 3.0), ("classifiers/b", "classifier b", 4.5), ("index", "index", 9.0)]
    for folder, label, seconds in jobs:
        (tmp_path / folder).mkdir(parents=True)
        manifest.write(
            tmp_path / folder,
            stage=label,
            params={},
            inputs={},
            outputs={},
            code="",
            seconds=seconds,
            machine=manifest.host(),
            arithmetic=[],
        )
    (tmp_path / "classifiers/c").mkdir()
    (tmp_path / "classifiers/c/manifest.json").write_text("damaged")
    found = seconds_by_stage(tmp_path)
    assert list(found) == ["index", "classifier"]  # the longest first
    assert found["index"] == [9.0]
    assert sorted(found["classifier"]) == [3.0, 4.5]
