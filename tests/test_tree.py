"""Ids of the photos in a tree of folders, as people name them."""

import os
import unicodedata
from pathlib import Path

import pytest

from pipeline.data.faults import Faults
from pipeline.data.tree import find_photos

NAMES = [
    "Urlaub 2024/Käfer 1.jpg",
    "IMG_0001.JPG",
    "a/b/c/d.jpeg",
    "50% #1.png",
    'it\'s "quoted".webp',
    "dot..tif",
    "-rf.bmp",
    "v1.2 final.TIFF",
    "x" * 200 + ".heic",
    "😀 👩‍👧.jfif",
    "جاده‌ها.gif",
    " spaces .HEIF",
]


def find(folder: Path) -> tuple[dict[str, str], list[str]]:
    faults = Faults()
    return find_photos(folder, faults), faults.lines()


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_any_tree_and_any_name(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in NAMES))
    touch(*(tmp_path / name for name in ("notes.txt", ".hidden.jpg", ".thumbnails/x.jpg", "film.mp4", "a/Thumbs.db")))
    found, faults = find(tmp_path)
    assert not faults
    assert found == {unicodedata.normalize("NFC", os.path.splitext(name)[0]): name for name in NAMES}


def test_accents_of_both_forms_are_one_id(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Käfer/é.jpg") for form in ("NFC", "NFD"))
    touch(tmp_path / decomposed)
    assert find(tmp_path) == ({composed[:-4]: decomposed}, [])
    touch(tmp_path / composed)
    (line,) = find(tmp_path)[1]
    assert line == f"{tmp_path / decomposed}: {tmp_path / composed} has the same id; " \
        "remove or rename one of the two"  # fmt: skip


def test_two_files_with_one_id_are_named_together(tmp_path: Path) -> None:
    one, other = tmp_path / "b/a.HEIC", tmp_path / "b/a.jpg"
    touch(one, other, *(tmp_path / name for name in ("A.jpg", "a.jpg", "b/a.jpg.png")))
    assert find(tmp_path)[1] == [f"{one}: {other} has the same id; remove or rename one of the two"]


@pytest.mark.parametrize("name", ["line\nbreak", "\x1b[2J", "\u202eevil", "back\\slash", "\udcff", "a/tab\t"])
def test_unfit_names_are_one_line(name: str, tmp_path: Path) -> None:
    touch(tmp_path / f"{name}.jpg")
    (line,) = find(tmp_path)[1]
    assert line.isprintable()
    assert line.endswith("contains a backslash; rename it" if name == "back\\slash" else "UTF-8 text; rename it")


def test_links_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path / "photos/x.jpg", tmp_path / "elsewhere/y.jpg")
    (tmp_path / "photos/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/loop").symlink_to(tmp_path / "photos")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path)
    assert find(tmp_path / "photos") == ({"x": "x.jpg", "more/y": "more/y.jpg"}, [])


def test_folders_without_photos(tmp_path: Path) -> None:
    assert find(tmp_path / "no")[1] == [
        f"{tmp_path}/no: cannot be listed (No such file or directory); create it or correct the path of the photos"
    ]
    touch(tmp_path / "list.txt")
    (line,) = find(tmp_path)[1]
    assert line.startswith(f"{tmp_path}: holds no photo; photos end in .jpg, ")
