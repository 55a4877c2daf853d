"""User-supplied text, XML and label files that are hostile, damaged or of another tool: read, or one line."""

import io
import json
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.build_index import build_index
from pipeline.data.class_file import read_classes
from pipeline.data.faults import LENGTH, Faults
from pipeline.data.index import Index
from pipeline.data.lists import read_list
from pipeline.data.tags import read_tags
from pipeline.errors import PipelineError
from tests.voc_tree import make_index, make_tree

CLASSES = ("cat", "dog", "potted plant", "fish, small")


PHOTOS = ("a", "b", "c", "a\nb")


def tags_of(path: Path, content: str | bytes, ids: tuple[str, ...] = PHOTOS) -> dict[str, tuple[int, ...]]:
    """Read tags without a fault."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    faults = Faults()
    tags = read_tags(
        path.parent if path.suffix == ".xml" else path, CLASSES, {name: f"{name}.jpg" for name in ids}, faults
    ).by_image
    assert faults.lines() == []
    return tags


def fault_of(path: Path, content: str | bytes, ids: tuple[str, ...] = PHOTOS) -> str:
    """The only fault of a tag file; it is a short line that starts with the file's name."""
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    faults = Faults()
    read_tags(path.parent if path.suffix == ".xml" else path, CLASSES, {name: f"{name}.jpg" for name in ids}, faults)
    (line,) = faults.lines()
    assert line.startswith(f"{path}: ")
    assert line.isprintable()
    assert len(line) <= LENGTH + 10
    return line.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.json", "[" * 100_000, "is nested too deep"),
        ("t.json", '{"a":' * 100_000, "is nested too deep"),
        ("t.json", '{"a": ' + "[" * 600 + "]" * 600 + "}", "a has the unknown tag (a list); write a class name or id"),
        ("t.json", '{"a": [{"b": 1}]}', "a has the unknown tag (a mapping); write a class name or id"),
        ("t.json", '{"a": {"b": [1]}}', "the tags of a must be a list, not a mapping"),
        ("t.json", '{"a": [1e999]}', "unknown tag inf"),
        ("t.json", '{"a": [NaN]}', "unknown tag nan"),
        ("t.json", '{"a": [null]}', "unknown tag None"),
        ("t.json", f'{{"a": [{"9" * 4000}]}}', "class id 999"),
        ("t.json", f'{{"a": [{"9" * 5000}]}}', "is not JSON"),
        ("t.json", '{"a\\nb": ["\\ud800"]}', r"a\nb has the unknown tag '\ud800'"),
        ("t.json", '{"a": ["' + "x" * 10**6 + '"]}', "a has the unknown tag 'xxx"),
        ("t.json", '{"a": [1],\n"b": [2],,}', "line 2 column 10"),
        ("t.json", b"{}\0\xff", "is not text"),
        ("t.csv", f"filename,tags\na,cat\nb,{'x' * 140_000}\n", "line 3 is not CSV (field larger than field limit"),
        ("t.csv", 'filename,tags\na,"cat\nb,dog\nc,cat\n', "line 2 is not CSV (unexpected end of data); correct its"),
        ("t.csv", 'filename,tags\na,cat\nb,"dog"x\n', "line 3 is not CSV"),
        ("t.csv", f"filename,tags\na,{'9' * 5000}\n", "unknown tag '999"),
        ("t.csv", "filename,tags\na,cat\0\n", r"unknown tag 'cat\x00'"),
        ("t.txt", f"a {'9' * 5000}\n", "unknown tag '999"),
    ],
)
def test_hostile_tags_are_one_short_line(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    assert said in fault_of(tmp_path / name, content)


def test_an_unclosed_quote_does_not_hide_the_lines_after_it(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('filename,tags\na,"cat\nb,zebra\nc,"dog\n')
    faults = Faults()
    assert read_tags(path, CLASSES, {"b": "b.jpg"}, faults).by_image == {"b": ()}
    assert [line.removeprefix(f"{path}: ")[:22] for line in faults.lines()] == [
        "line 2 is not CSV (une",
        "line 4 is not CSV (une",
        "b has the unknown tag ",
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "filename,tags\na,cat dog\nb,fish, small\nc,potted plant;fish, small;cat\n"),
        ("t.csv", 'filename,tags\na,"dog,cat"\nb,"fish, small"\nc,"cat,fish, small,potted plant"\n'),
        ("t.txt", "a cat dog\nb fish, small\nc potted plant;fish, small,cat\n"),
        ("t.txt", "a 0 1\nb 3\nc 0 2 3\n"),
        ("t.json", '{"a": [1, 2], "b": ["fish, small"], "c": ["fish, small", "potted plant", "cat"]}'),
    ],
)
def test_class_names_may_contain_separators(tmp_path: Path, name: str, content: str) -> None:
    assert tags_of(tmp_path / name, content) == {"a": (1, 2), "b": (4,), "c": (1, 3, 4)}


def test_a_text_file_separates_class_names_with_spaces(tmp_path: Path) -> None:
    assert tags_of(tmp_path / "t.txt", "a potted plant cat\nb dog potted plant\n") == {"a": (1, 3), "b": (2, 3)}


@pytest.mark.parametrize("name", ["a b.jpg", "x\\y\\a b.jpg", "C:\\pictures\\a b.PNG", "x/a b"])
def test_paths_of_windows_are_cut_to_their_last_part(tmp_path: Path, name: str) -> None:
    assert tags_of(tmp_path / "t.csv", f"filename,tags\r\n{name},cat\r\n", ("a b",)) == {"a b": (1,)}
    assert tags_of(tmp_path / "t.json", json.dumps({name: [1]}), ("a b",)) == {"a b": (1,)}
    assert tags_of(tmp_path / "t.txt", f"{name} 0\r\n", ("a b",)) == {"a b": (1,)}


def listed(path: Path, text: str, images: tuple[str, ...]) -> list[str]:
    path.write_text(text, newline="")
    faults = Faults()
    ids = read_list(path, faults, {name: f"{name}.jpg" for name in images})
    assert faults.lines() == []
    return ids


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("site 1 north\nIMG (7)\n", ["site 1 north", "IMG (7)"]),
        ("site 1 north.jpg\n/x/IMG (7).png\r\n", ["site 1 north", "IMG (7)"]),
        ("/J P/site 1 north.jpg /M/site 1 north.png\n", ["site 1 north"]),
        ("JPEGImages\\site 1 north.jpg\tmasks\\2.png\n", ["site 1 north"]),
        ("photos/1.jpg masks/2.png\n", ["1"]),
        ("site 1 north 0 14\nsite 3\n1 0 2\n2 5\n", ["site 1 north", "site", "1", "2"]),
        ("two  spaces\n", ["two  spaces"]),
        ("unknown 0 1\nlost.jpg masks/lost.png\n", ["unknown", "lost"]),
        ("site 9 south\n", ["site 9 south"]),  # a missing file: named whole
        ("a.jpg b\n", ["a.jpg b"]),
    ],
)
def test_listed_names_may_contain_spaces(tmp_path: Path, text: str, ids: list[str]) -> None:
    images = ("site 1 north", "IMG (7)", "site", "1", "2", "two  spaces", "a.jpg b")
    if "south" in text:
        images = images[:2]
    assert listed(tmp_path / "train.txt", text, images) == ids


def test_a_long_line_is_no_name_of_many_words(tmp_path: Path) -> None:
    start = time.monotonic()
    assert listed(tmp_path / "train.txt", "a " + "0 " * 10**6, ("b",)) == ["a"]
    assert time.monotonic() - start < 10


def test_an_index_of_names_with_spaces(tmp_path: Path) -> None:
    dataset = make_tree(tmp_path, train=2, evaluation=1)
    for path in [*tmp_path.rglob("*.jpg"), *tmp_path.rglob("*.png")]:
        path.rename(path.with_name(path.name.replace("img_", "IMG (").replace(".", " b).")))
    for path in [*tmp_path.rglob("*.txt"), *tmp_path.rglob("*.json")]:
        if path.name != "classes.txt":
            path.write_text(
                "".join(path.read_text())
                .replace("img_000", "IMG (000 b)")
                .replace("img_001", "IMG (001 b)")
                .replace("img_002", "IMG (002 b)")
            )
    assert build_index(dataset).index["splits"] == {
        "train": ["IMG (000 b)", "IMG (001 b)"],
        "evaluation": ["IMG (002 b)"],
    }


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("_background_\ncat\ndog\n", ["cat", "dog"]),  # labelme's class_names.txt
        ("__ignore__\n_background_\ncat\ndog\n", ["cat", "dog"]),  # its labels.txt
        ("background\ncat\n", ["cat"]),
        ("\ufeffBackground\r\ncat\r\n", ["cat"]),
        ("<void>\n__background__\ncat\n", ["cat"]),
        ("cat\nbackground noise\n", ["cat", "background noise"]),
    ],
)
def test_background_before_the_first_class_is_understood(tmp_path: Path, text: str, names: list[str]) -> None:
    (tmp_path / "classes.txt").write_text(text, "utf-8")
    faults = Faults()
    assert read_classes(tmp_path, "classes.txt", faults) == names
    assert faults.lines() == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cat\nbackground\n", "names background, which is always class 0, after other classes"),
        ("cat\ndog\nvoid\n", "names void, but pixels without a class have the id 255"),
        ("__ignore__\ncat\n", "names __ignore__, but pixels without a class have the id 255"),
        ("_background_\n__ignore__\ncat\n", "names __ignore__, but pixels without a class"),
        ("_background_\n", "names 0 classes"),
        ("# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:128,0,0::\n", "is CVAT's label map"),
        ("cat:128,0,0::\n", "is CVAT's label map"),
        ("c\xe4t", "cannot be read ('utf-8' codec can't decode"),
    ],
)
def test_other_lists_of_labels_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "classes.txt").write_text(text, "latin1")
    faults = Faults()
    read_classes(tmp_path, "classes.txt", faults)
    (line,) = faults.lines()
    assert line.startswith(f"{tmp_path}/classes.txt: {said}")


OBJECT = "<annotation><folder>図像图</folder><object><name>{}</name></object></annotation>"


@pytest.mark.parametrize(
    ("declared", "written"),
    [
        ("gb2312", "gb2312"),
        ("GB2312", "gb18030"),  # as Windows writes it
        ("gbk", "gbk"),
        ("shift_jis", "shift_jis"),
        ("Shift_JIS", "cp932"),
        ("euc-kr", "cp949"),
        ("big5", "big5"),
        ("windows-1251", "cp1251"),
        ("iso-8859-1", "latin1"),
        ("utf-8", "utf-8"),
        ("UTF8", "utf-8-sig"),
        ("utf-16", "utf-16"),
        ("utf-16", "utf-16-le"),
        ("utf-16", "utf-8"),  # a string that .NET serialized
        ("us-ascii", "utf-8"),
    ],
)
def test_annotations_in_any_encoding(tmp_path: Path, declared: str, written: str) -> None:
    text = f'<?xml version="1.0" encoding="{declared}"?>\n{OBJECT.format("dog")}'
    content = text.encode(written, "ignore")
    assert tags_of(tmp_path / "a.xml", content, ("a",)) == {"a": (2,)}


def test_the_text_is_decoded_and_not_only_ignored(tmp_path: Path) -> None:
    text = f'<?xml version="1.0" encoding="shift_jis"?>\n{OBJECT.format("猫")}'
    (tmp_path / "a.xml").write_bytes(text.encode("shift_jis", "ignore"))
    faults = Faults()
    assert read_tags(tmp_path, ("犬", "猫"), {"a": "a.jpg"}, faults).by_image == {"a": (2,)}
    assert faults.lines() == []


def laughs(levels: int = 30) -> str:
    entities = "".join(f'<!ENTITY e{n + 1} "{f"&e{n};" * 10}">' for n in range(levels))
    return f'<!DOCTYPE a [<!ENTITY e0 "ha">{entities}]><annotation>&e{levels};</annotation>'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('<?xml version="1.0" encoding="martian"?><annotation/>', "cannot be read (unknown encoding: martian)"),
        ('<?xml version="1.0" encoding="hex"?><annotation/>', "cannot be read ('hex' is not a text encoding"),
        ('<?xml version="1.0" encoding="gbk"?><a>\udcff\udcff</a>', "cannot be read ("),
        ("<annotation>\0</annotation>", "cannot be read (not well-formed"),
        ('<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>', "cannot be read (it defines entities)"),
        (laughs(), "cannot be read (it defines entities)"),
        ("<a>" * 100_000, "cannot be read (no element found"),
    ],
)
def test_hostile_annotations_are_one_line(tmp_path: Path, content: str, said: str) -> None:
    data = content.encode("utf-8", "surrogateescape")
    assert fault_of(tmp_path / "a.xml", data, ("a",)).startswith(said)


def test_deep_xml_is_read_without_a_crash(tmp_path: Path) -> None:
    depth = 300_000
    assert tags_of(tmp_path / "a.xml", "<a>" * depth + "</a>" * depth, ("a",)) == {"a": ()}


def labels(content: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, content, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("key", "name", "ids"),
    [
        ("img_00.jpg", "img_00", ("img_00",)),
        (101, "101", ("101", "102")),
        (139, "000000000139", ("000000000139", "000000001390")),
        (2007000032, "2007_000032", ("2007_000032",)),
        (2007000032, "2007000032", ("2007000032",)),
        (7, None, ("07", "007")),  # ambiguous: neither
    ],
)
def test_keys_of_a_label_file_are_matched_with_the_images(
    tmp_path: Path, key: Any, name: str | None, ids: tuple[str, ...]
) -> None:
    content = labels({key: np.array([0, 1, 0, 1], np.float32)})
    assert tags_of(tmp_path / "t.npy", content, ids) == ({name: (2, 4)} if name else {})


def test_a_label_file_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    """The unpickler's table grows to twice the largest index: 64 GB here."""
    header = labels({})[:128]
    assert fault_of(tmp_path / "t.npy", header + b"\x80\x04}r\xff\xff\xff\xff.").startswith("not a label file")


def test_a_label_file_that_would_crash_is_refused(tmp_path: Path) -> None:
    """The hash of a deeply nested tuple overflows the stack."""
    header = labels({})[:128]
    line = fault_of(tmp_path / "t.npy", header + b"\x80\x04})" + b"\x85" * 10**6 + b"Ns.")
    assert line.startswith("damaged: reading it ended the process (SIGSEGV); provide the tags as .json or .csv")


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.pop("classes"),
        lambda raw: raw.update(images=[]),
        lambda raw: raw["images"]["img_000"].pop("file"),
        lambda raw: raw["images"]["img_000"].update(mask=[1]),
        lambda raw: raw["splits"].pop("train"),
        lambda raw: raw["splits"].update(train=["unknown"]),
        lambda raw: raw["splits"].update(train=[["img_000"]]),
    ],
)
def test_a_damaged_index_is_one_line(tmp_path: Path, change: Any) -> None:
    path = make_index(tmp_path, train=1, evaluation=1)
    raw = json.loads(path.read_text())
    change(raw)
    for text in (json.dumps(raw), "[" * 100_000, "[]", "\0"):
        path.write_text(text)
        with pytest.raises(PipelineError, match=r"index\.json: not an index \(.*; run the index stage again"):
            Index(path)


def test_errors_stay_one_line_each_across_processes() -> None:
    error = pickle.loads(pickle.dumps(PipelineError("a\nb", "c\ud800", "käfer 猫")))
    assert error.lines == (r"a\nb", r"c\ud800", "käfer 猫")
    assert str(error).count("\n") == 2
