"""The stage frame: what it refuses, skips, reruns, waits for and leaves behind."""

import errno
import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.params import load
from pipeline.runtime import Runtime
from pipeline.stores import manifest
from pipeline.stores.files import partial
from pipeline.workflow.freshness import is_fresh
from pipeline.workflow.graph import Graph
from pipeline.workflow.stage import Work, execute, progress, run
from stages import classifier, index, localization, saliency
from tests.harm import killed_while_publishing
from tests.project import link_code
from tests.voc_tree import make_tree, minimal_params

RESULTS = Path("results/test")
BASE = RESULTS / "classifiers/base"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a dataset, params.yaml, the index, and this project's own code."""
    monkeypatch.chdir(tmp_path)
    link_code(tmp_path)
    params = minimal_params(make_tree(Path("data")))
    params["classifiers"]["other"] = params["classifiers"]["base"]
    Path("params.yaml").write_text(yaml.safe_dump(params))
    run("index", index.main, [])
    return tmp_path


class Fake:
    """A stage's work in no time: each output holds the number of the call."""

    def __init__(self, also: Callable[[Work], None] = lambda work: None) -> None:
        self.calls: list[Work] = []
        self.also = also

    def __call__(self, work: Work) -> None:
        self.calls.append(work)
        for name, path in work.outputs.items():
            path.write_text(f"{name} {len(self.calls)}")
        self.also(work)


def start(work: Callable[[Work], None], *arguments: str, name: str = "classifier") -> None:
    run(name, work, [*(arguments or ("base",))])


def refused(work: Callable[[Work], None], *arguments: str, name: str = "classifier") -> None:
    with pytest.raises(SystemExit) as caught:
        start(work, *arguments, name=name)
    assert caught.value.code == 1


def set_(section: str, block: str, **values: Any) -> list[str]:
    return [block, "--set", json.dumps({section: {block: values}})]


def flip_a_bit(path: Path) -> str:
    """Returns the sha256 that it had."""
    content = bytearray(path.read_bytes())
    before = hashlib.sha256(content).hexdigest()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return before


def lines(text: str) -> list[str]:
    return text.rstrip("\n").split("\n")


class TestRefusals:
    def test_missing_inputs_are_all_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        fake = Fake()
        refused(fake, "cam", name="pseudo_labels")
        missing = "missing ({} of pseudo_labels cam); run the stage that writes it"
        assert lines(capsys.readouterr().err) == [
            f"error: results/test/localizations/cam/maps.h5: {missing.format('maps')}",
            f"error: results/test/saliency/maps.h5: {missing.format('saliency')}",
        ]
        assert not fake.calls
        assert not (RESULTS / "pseudo_labels/cam/labels.h5").exists()

    @pytest.mark.parametrize(("backbone", "library"), [("small", "torchvision"), ("timm:mobilenetv3_rw", "timm")])
    def test_missing_weights_are_named(self, backbone: str, library: str, capsys: pytest.CaptureFixture[str]) -> None:
        refused(Fake(), *set_("classifiers", "base", backbone={"name": backbone, "weights": "none.pth"}))
        fix = "put the file there, or correct backbone.weights"
        fault = "none.pth: missing (weights of backbone of classifier base)"
        expected = f"error: {fault}; {fix}: 'imagenet' downloads {library}'s, if any, null starts at random"
        assert lines(capsys.readouterr().err) == [expected]

    def test_a_flipped_bit_in_a_store_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        start(saliency.main, "", name="saliency")
        start(Fake())
        start(Fake(), "cam", name="localization")
        store = RESULTS / "saliency/maps.h5"
        saved = flip_a_bit(store)
        capsys.readouterr()
        fake = Fake()
        refused(fake, "cam", name="pseudo_labels")
        found = hashlib.sha256(store.read_bytes()).hexdigest()
        assert capsys.readouterr().err == (
            f"error: {store}: damaged or changed by hand: sha256 is {found}, its manifest says {saved}; "
            f"delete {store} and run its stage again\n"
        )
        assert not fake.calls

    def test_a_flipped_bit_in_a_model_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        """By the real stages: the damaged model is never loaded."""
        start(classifier.main, "base", "--threads", "1")
        saved = flip_a_bit(BASE / "model.pt")
        capsys.readouterr()
        refused(localization.main, "cam", "--threads", "1", name="localization")
        (line,) = lines(capsys.readouterr().err)
        assert line.startswith(f"error: {BASE}/model.pt: damaged or changed by hand: sha256 is ")
        assert f"its manifest says {saved}" in line
        assert not (RESULTS / "localizations/cam/maps.h5").exists()

    def test_an_unknown_block_lists_the_choices(self, capsys: pytest.CaptureFixture[str]) -> None:
        refused(Fake(), "nonesuch")
        assert capsys.readouterr().err == "error: classifier nonesuch: no such block; classifier can run base, other\n"
        refused(Fake(), "x", name="mixture")
        assert "nothing: params.yaml has no block for it" in capsys.readouterr().err

    def test_faulty_params_are_refused_whole(self, capsys: pytest.CaptureFixture[str]) -> None:
        refused(Fake(), *set_("classifiers", "base", metod="cam", accumulate={"cells": "many"}))
        assert len(lines(capsys.readouterr().err)) == 2
        for text in ("{seed: 5}", "[5]"):
            refused(Fake(), "base", "--set", text)
            assert capsys.readouterr().err.startswith(f"error: --set '{text}': ")
        refused(Fake(), "base", "--params", "nonesuch.yaml")
        assert "nonesuch.yaml: no such file" in capsys.readouterr().err

    def test_a_bug_shows_its_traceback(self) -> None:
        def broken(work: Work) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            start(broken)


class TestDisk:
    """Errors of the disk are one line; tests/test_faults.py injects them into every stage."""

    @pytest.mark.parametrize(
        ("number", "name", "line"),
        [
            (errno.ENOSPC, None, f"{BASE}: No space left on device; free some space or raise the quota there, "),
            (errno.ENOSPC, "x.h5", "x.h5: No space left on device; free some space or raise the quota there, "),
            (errno.EFBIG, "x.h5", "x.h5: File too large; raise the limit on the size of a file"),
            (errno.EIO, 7, f"{BASE}: Input/output error; check the disk"),
            (errno.EROFS, b"x.h5", "x.h5: Read-only file system; make the file system writable"),
        ],
    )
    def test_an_error_is_one_line(self, number: int, name: Any, line: str, capsys: pytest.CaptureFixture[str]) -> None:
        def full(work: Work) -> None:
            raise OSError(number, "text", name)

        refused(Fake(full), "base")
        (found,) = lines(capsys.readouterr().err)
        assert found.startswith(f"error: {line}")

    def test_the_error_of_a_dataset_names_its_folder(self, capsys: pytest.CaptureFixture[str]) -> None:
        def full(work: Work) -> None:
            raise OSError(errno.ENOSPC, "text")

        dataset = {"root": "made", "demo": {}}
        refused(full, "", "--set", json.dumps({"dataset": dataset}), name="demo")
        assert capsys.readouterr().err.startswith("error: made: No space left on device; ")

    def test_other_errors_are_bugs(self) -> None:
        def lost(work: Work) -> None:
            raise FileNotFoundError(errno.ENOENT, "text", "x.h5")

        with pytest.raises(FileNotFoundError):
            start(lost)


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

    def test_a_changed_input_reruns(self, project: Path) -> None:
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
