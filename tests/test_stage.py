"""The stage frame: what it skips, reruns, publishes, waits for and leaves behind."""

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.params import load
from pipeline.runtime import Runtime
from pipeline.stores import manifest
from pipeline.stores.files import partial
from pipeline.workflow.freshness import is_fresh
from pipeline.workflow.graph import Graph
from pipeline.workflow.stage import Work, execute, progress, run
from stages import classifier, index
from tests.fake_stage import BASE, RESULTS, Fake, lines, project, set_, start  # noqa: F401
from tests.harm import killed_while_publishing


class TestFreshness:
    def test_what_is_up_to_date_is_skipped(self, capsys: pytest.CaptureFixture[str]) -> None:
        fake = Fake()
        start(fake)
        start(fake)
        assert len(fake.calls) == 1
        assert capsys.readouterr().out.endswith("classifier base: up to date\n")
        start(fake, "base", "--force")
        assert len(fake.calls) == 2
        assert (BASE / "model.pt").read_text() == "model 2"

    def test_how_it_runs_changes_nothing(self) -> None:
        fake = Fake()
        start(fake)
        start(fake, "base", "--threads", "3", "--workers", "2", "--device", "cpu", "--checkpoint-every", "1")
        assert len(fake.calls) == 1

    def test_other_weights_of_the_same_name_rerun(self) -> None:
        fake, weights = Fake(), Path("weights.pth")
        given = set_("classifiers", "base", backbone={"name": "small", "weights": str(weights)})
        for content in ("one", "one", "other"):
            weights.write_text(content)
            start(fake, *given)
        assert len(fake.calls) == 2

    def test_changed_params_rerun_their_own_block_only(self) -> None:
        base, other = Fake(), Fake()
        start(base)
        start(other, "other")
        changed = json.dumps({"classifiers": {"base": {"accumulate": {"cells": 9}}}})
        start(base, "base", "--set", changed)
        start(other, "other", "--set", changed)
        assert (len(base.calls), len(other.calls)) == (2, 1)
        assert base.calls[1].job.block.accumulate.cells == 9
        start(base)
        assert len(base.calls) == 3  # and back

    def test_another_seed_reruns(self) -> None:
        fake = Fake()
        start(fake)
        start(fake, "base", "--set", '{"seed": 5}')
        assert [work.job.params["seed"] for work in fake.calls] == [0, 5]

    def test_a_changed_input_reruns(self, project: Path) -> None:  # noqa: F811
        fake = Fake()
        start(fake)
        tags = json.loads(Path("data/tags.json").read_text())
        tags["img_000"] = [1, 2]
        Path("data/tags.json").write_text(json.dumps(tags))
        run("index", index.main, [])
        start(fake)
        assert len(fake.calls) == 2

    def test_changed_code_reruns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Which code that is: tests/test_closure.py."""
        fake = Fake()
        start(fake)
        monkeypatch.setattr("pipeline.workflow.closure.digest", lambda roots: "other code")
        start(fake)
        start(fake)
        assert len(fake.calls) == 2

    @pytest.mark.parametrize("lost", ["model.pt", "snapshots.h5", "manifest.json"])
    def test_a_lost_file_reruns(self, lost: str) -> None:
        fake = Fake()
        start(fake)
        (BASE / lost).unlink()
        start(fake)
        assert len(fake.calls) == 2


class TestPublishing:
    def test_outputs_and_their_manifest(self) -> None:
        start(Fake())
        names = {"model.pt", "log.json", "maps.h5", "snapshots.h5"}
        assert {path.name for path in BASE.iterdir()} == {*names, "manifest.json", ".lock-classifier"}
        found = manifest.read(BASE)
        assert found is not None
        assert found["stage"] == "classifier base"
        assert found["outputs"] == {name: hashlib.sha256((BASE / name).read_bytes()).hexdigest() for name in names}
        assert found["inputs"] == {"index": hashlib.sha256((RESULTS / "index/train.json").read_bytes()).hexdigest()}
        assert found["params"]["seed"] == 0
        assert found["params"]["block"]["training"]["lr"] == 0.1

    def test_an_exception_leaves_no_output_but_a_partial(self) -> None:
        def broken(work: Work) -> None:
            raise RuntimeError

        with pytest.raises(RuntimeError):
            start(Fake(broken))
        assert {path.name for path in BASE.iterdir()} == {
            ".lock-classifier",
            *(f".{name}.partial" for name in ("model.pt", "log.json", "maps.h5", "snapshots.h5")),
        }
        fake = Fake()
        start(fake)
        assert len(fake.calls) == 1
        assert not list(BASE.glob("*.partial"))

    def test_a_failed_rerun_leaves_the_old_outputs(self) -> None:
        def broken(work: Work) -> None:
            raise RuntimeError

        start(Fake())
        before = {path.name: path.read_bytes() for path in BASE.iterdir() if path.is_file()}
        with pytest.raises(RuntimeError):
            start(Fake(broken), "base", "--force")
        assert {name: (BASE / name).read_bytes() for name in before} == before

    @pytest.mark.parametrize("published", [1, 2, 3, 4])
    def test_killed_while_publishing_it_publishes_again(
        self, published: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """By the real stage: its last checkpoint lies at the training's end, so that there is nothing left to train."""
        options = ("base", "--threads", "1", "--checkpoint-every", "0")
        with killed_while_publishing(published) as done:
            start(classifier.main, *options)
        before = {path: path.read_bytes() for path in done}
        start(classifier.main, *options)
        assert "resumes from epoch" in capsys.readouterr().out
        assert {path: path.read_bytes() for path in done} == before
        assert is_fresh(Graph(load([Path("params.yaml")])).find("classifier", "base"), {})
        assert not list(BASE.glob(".*checkpoint*"))

    def test_killed_after_publishing_its_checkpoint_goes_at_the_next_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A checkpoint of other params remains, so that their run can resume."""

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        fake = Fake(lambda work: work.checkpoint.mkdir())
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.workflow.stage._remove_state", killed)
            with pytest.raises(KeyboardInterrupt):
                start(fake)
        other = BASE / ".checkpoint-classifier-0123456789abcdef"
        other.touch()
        start(fake)
        assert len(fake.calls) == 1
        assert list(BASE.glob(".*checkpoint*")) == [other]

    def test_an_interrupted_checkpoint_is_not_left_behind(self) -> None:
        def unfinished(work: Work) -> None:
            partial(work.checkpoint).touch()

        start(Fake(unfinished))
        assert not list(BASE.glob(".*checkpoint*"))

    def test_the_checkpoint_belongs_to_the_job(self) -> None:
        """One path for one set of parameters, another for another; kept on failure, removed on success."""

        def broken(work: Work) -> None:
            work.checkpoint.write_text("state")
            raise RuntimeError

        def folder(work: Work) -> None:
            assert not list(BASE.glob("*.h5"))
            work.checkpoint.mkdir()
            (work.checkpoint / "part").touch()
            work.checkpoint.with_name(f"{work.checkpoint.name}-epoch-000.h5").touch()

        first, second, third = Fake(broken), Fake(broken), Fake(folder)
        for fake in (first, second):
            with pytest.raises(RuntimeError):
                start(fake)
        start(third, "base", "--set", '{"seed": 5}')
        paths = [fake.calls[0].checkpoint for fake in (first, second, third)]
        assert paths[0] == paths[1] != paths[2]
        assert not list(BASE.glob(".checkpoint*"))

    def test_outputs_of_two_runs_are_told_apart(self) -> None:
        """The graph sees what a run leaves: fresh afterwards, stale once the params differ."""
        job = Graph(load([Path("params.yaml")])).find("classifier", "base")
        assert not is_fresh(job, {})
        start(Fake())
        assert is_fresh(job, {})
        changed = Graph(load([Path("params.yaml")], {"seed": 7})).find("classifier", "base")
        assert not is_fresh(changed, {})


class TestLock:
    def test_a_second_process_waits_and_finds_the_work_done(self, capsys: pytest.CaptureFixture[str]) -> None:
        """``flock`` binds the open file, so that two threads stand for two processes."""
        job = Graph(load([Path("params.yaml")])).find("classifier", "base")
        began, may_end = threading.Event(), threading.Event()

        def slow(work: Work) -> None:
            began.set()
            assert may_end.wait(20)

        first, second = Fake(slow), Fake()
        threads = [threading.Thread(target=execute, args=(job, fake, Runtime())) for fake in (first, second)]
        threads[0].start()
        assert began.wait(20)
        threads[1].start()
        threads[1].join(0.3)
        assert threads[1].is_alive()
        may_end.set()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert (len(first.calls), len(second.calls)) == (1, 0)
        out = capsys.readouterr().out
        assert f"classifier base: waiting for process {(BASE / '.lock-classifier').read_text()}, which is" in out
        assert out.endswith("classifier base: up to date\n")

    def test_other_blocks_do_not_wait(self) -> None:
        def nested(work: Work) -> None:
            start(Fake(), "other")

        start(Fake(nested))
        assert (RESULTS / "classifiers/other/model.pt").exists()


class TestProgress:
    def test_a_log_gets_a_line_every_tenth_part(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sys.stderr.isatty", lambda: False)
        assert list(progress(range(25), "saliency")) == list(range(25))
        said = lines(capsys.readouterr().out)
        assert said == [f"saliency: {count}/25" for count in (3, 6, 9, 12, 15, 18, 21, 24, 25)]
