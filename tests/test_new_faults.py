"""``wsss new``: what is wrong with photos and tags is said in one line, with the option that settles it, if any."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.tagged import PHOTOS, TAGS, checkout, picture, rows, table, text  # noqa: F401
from tests.trained import command


def truncated() -> tuple[str, ...]:
    data = (PHOTOS / "e.jpg").read_bytes()
    (PHOTOS / "e.jpg").write_bytes(data[: len(data) // 2])
    return (table(),)


def weights_of_another_network() -> tuple[str, ...]:
    torch.save({"layer.weight": torch.zeros(3)}, "w.pth")
    return table(), "--weights", "w.pth"


def a_mask(name: str, size: tuple[int, int]) -> tuple[str, ...]:
    Path("masks").mkdir()
    Image.new("L", size, 0).save(f"masks/{name}.png")
    return table(), "--masks", "masks", "--evaluation", "0.5"


def a_map() -> tuple[str, ...]:
    Path("maps").mkdir()
    for name in list(TAGS)[1:]:
        Image.new("L", (60, 40)).save(f"maps/{Path(name).stem}.png")
    return table(), "--saliency", "maps"


def without(*names: str) -> dict[str, list[str]]:
    return {Path(name).stem: tags for name, tags in TAGS.items() if name not in names}


BLANKS = ("cat dog", "dog cat", "cat")


def test_the_user_says_what_blanks_mean(capsys: pytest.CaptureFixture[str]) -> None:
    tags = rows("blanks.csv", [["file", "tags"], *([name, BLANKS[n % 3]] for n, name in enumerate(TAGS))])
    for blanks, classes in (("separate", "cat 8, dog 6"), ("belong", "cat dog 3, dog cat 3, cat 2")):
        assert command("new", PHOTOS, tags, "--name", blanks, "--weights", "none", "--blanks", blanks) == 0
        assert f": {classes}\n" in capsys.readouterr().out
        assert f"--blanks {blanks}" in Path(f"profiles/{blanks}.yaml").read_text()


BAD: dict[str, Callable[[], tuple[str, ...]]] = {
    "TAGS no.csv: no such file or folder; correct the path": lambda: ("no.csv",),
    "--masks no: no such folder; correct the path": lambda: (table(), "--masks", "no"),
    "--saliency no: no such folder; name a folder of maps, or rembg": lambda: (table(), "--saliency", "no"),
    "--saliency rembg: rembg is not installed; pip install 'rembg[cpu]'": lambda: (table(), "--saliency", "rembg"),
    "--evaluation 0: must be above 0 and below 1": lambda: (table(), "--evaluation", "0"),
    "--evaluation 1.5: must be above 0 and below 1": lambda: (table(), "--evaluation", "1.5"),
    "--seed -1: must be at least 0": lambda: (table(), "--seed", "-1"),
    "--name a/b: ": lambda: (table(), "--name", "a/b"),
    "--name demo: is the experiment of params.yaml": lambda: (table(), "--name", "demo"),
    "--leave-out bird: is not a class of the tags; the classes are cat, dog": lambda: (table(), "--leave-out", "bird"),
    "--leave-out: leaves out every class": lambda: (table(), "--leave-out", "cat", "dog"),
    "--weights no.pth: ": lambda: (table(), "--weights", "no.pth"),
    "--weights w.pth: fits none of the networks": weights_of_another_network,
    "has no entry for 1 of 8 photos (g.jpg); tag them": lambda: (text("t.json", without("g.jpg")),),
    "zebra": lambda: (text("t.json", without() | {"zebra": ["cat"]}),),
    "t.json": lambda: (text("t.json", "{"),),
    "blanks.csv: 'cat dog' may be one class or the tags cat and dog, and so may 1 more; add --blanks ": lambda: (
        rows("blanks.csv", [["file", "tags"], *([name, BLANKS[n % 3]] for n, name in enumerate(TAGS))]),
    ),
    "names no class": lambda: (text("t.json", {Path(name).stem: [] for name in TAGS}),),
    "my photos/e.jpg": truncated,
    "my photos/c.jpg: ": lambda: (str(picture(PHOTOS / "c.jpg", 99)) and table(),),
    "masks: no mask has the name of a photo (x.png, but photos are": lambda: a_mask("x", (60, 40)),
    "masks/c.png: is 40x60, but its image is 60x40": lambda: a_mask("c", (40, 60)),
    "maps/Käfer 1.png: missing": a_map,
    "my photos/z.jpg": lambda: (text("my photos/z.jpg", "no photo") and text("t.json", without() | {"z": ["cat"]}),),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_wrong_is_said_in_one_line(fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = BAD[fault]()
    if "--weights" not in arguments:
        arguments += ("--weights", "none")
    assert command("new", PHOTOS, *arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert fault in captured.err
    assert captured.out == ""
    assert list(Path("profiles").iterdir()) == []
    assert not Path("data").exists() or list(Path("data").iterdir()) == []


def test_broken_photos_are_left_out_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    (tags,) = truncated()
    (PHOTOS / "c.png").write_bytes(b"")
    assert command("new", PHOTOS, tags, "--weights", "none") == 1
    lines = capsys.readouterr().err.splitlines()
    named = [f"{PHOTOS}/{name}: " for name in ("c.png", "e.jpg")]
    assert all(line.startswith(f"error: {start}") for line, start in zip(sorted(lines), named, strict=True))
    assert all(line.endswith(", or leave it out by --skip-broken") for line in lines)
    assert command("new", PHOTOS, tags, "--weights", "none", "--skip-broken") == 0
    printed = capsys.readouterr().out
    assert "photos:    6: " in printed
    notes = [line for line in printed.splitlines() if line.startswith("note: left out: ")]
    assert all(start in line for line, start in zip(sorted(notes), named, strict=True))
    listed = "".join(Path(f"data/mine/{name}.txt").read_text() for name in ("train", "evaluation")).split("\n")
    assert not {"c", "e"} & {*listed, *json.loads(Path("data/mine/tags.json").read_text())}
    for file in PHOTOS.iterdir():
        file.write_bytes(b"")
    assert command("new", PHOTOS, tags, "--weights", "none", "--skip-broken", "--force") == 1
    assert "holds 0 different photos, and 8 that cannot be read; at least 2 are needed" in capsys.readouterr().err


def test_folders_without_photos_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for folder, fault in (("nowhere", "PHOTOS nowhere: no such folder"), ("empty", "empty: holds no photo")):
        if folder == "empty":
            Path("empty").mkdir()
        assert command("new", folder, table(), "--weights", "none") == 1
        assert fault in capsys.readouterr().err
    shutil.rmtree(PHOTOS)
    picture(PHOTOS / "a.jpg", 1)
    assert command("new", PHOTOS, text("one.json", {"a": ["cat"]}), "--weights", "none") == 1
    error = capsys.readouterr().err
    assert "holds 1 different photo; at least 2 are needed" in error


def test_all_faults_are_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    truncated()
    tags = text("t.json", without("g.jpg") | {"zebra": ["cat"]})
    assert command("new", PHOTOS, tags, "--seed", "-2", "--leave-out", "fish", "--weights", "no.pth") == 1
    error = capsys.readouterr().err
    for part in ("--seed -2", "--weights no.pth", "zebra", "no entry for 1 of 8", "--leave-out fish", "photos/e.jpg"):
        assert part in error, error
    assert error.count("\n") == 6
