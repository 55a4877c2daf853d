"""What the stage frame refuses, and errors of the disk: each is one line, and only a bug shows its traceback."""

import errno
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.workflow.stage import Work
from stages import classifier, localization, saliency
from tests.fake_stage import BASE, RESULTS, Fake, lines, project, set_, start  # noqa: F401


def refused(work: Callable[[Work], None], *arguments: str, name: str = "classifier") -> None:
    with pytest.raises(SystemExit) as caught:
        start(work, *arguments, name=name)
    assert caught.value.code == 1


def flip_a_bit(path: Path) -> str:
    """Returns the sha256 that it had."""
    content = bytearray(path.read_bytes())
    before = hashlib.sha256(content).hexdigest()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return before


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
