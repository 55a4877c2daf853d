"""Tags and image lists in every accepted format, and the inputs that are refused."""

import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data import cls_labels
from pipeline.data.faults import LIMIT, Faults
from pipeline.data.lists import read_list
from pipeline.data.tags import Tags, read_tags
from pipeline.data.voc import CLASSES as VOC
from pipeline.errors import PipelineError

CLASSES = ("cat", "dog", "potted plant")
LISTS = Path("../shared/data/voc12_lists")
MINI = Path("../shared/data/voc12_mini")
with_lists = pytest.mark.skipif(not LISTS.is_dir(), reason=f"the field's label files are not at {LISTS}")
with_mini = pytest.mark.skipif(not MINI.is_dir(), reason=f"the small VOC is not at {MINI}")


PHOTOS = ("a", "b.v2", "c", "2007_000032", "other")


def read(path: Path, ids: Sequence[str] = PHOTOS, classes: tuple[str, ...] = CLASSES) -> Tags:
    """Read tags without any fault."""
    faults = Faults()
    tags = read_tags(path, classes, {name: f"{name}.jpg" for name in ids}, faults)
    assert faults.lines() == []
    return tags


def faults_of(path: Path, ids: Sequence[str] = PHOTOS) -> list[str]:
    faults = Faults()
    read_tags(path, CLASSES, {name: f"{name}.jpg" for name in ids}, faults)
    return faults.lines()


def save_labels(path: Path, content: Any) -> Path:
    """Save in the format of the field's tools."""
    np.save(path, content, allow_pickle=True)
    return path


def vector(*class_ids: int) -> np.ndarray[Any, Any]:
    out = np.zeros(len(CLASSES), np.float32)
    out[[class_id - 1 for class_id in class_ids]] = 1
    return out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tags.json", '{"a": [2, 1], "b.v2": ["potted plant"], "c": []}'),
        ("tags.json", '{"a": ["dog", "cat", 2], "b.v2": [3], "c": []}'),
        ("tags.csv", "filename,tags\na.jpg,dog cat\nb.v2.PNG,potted plant\nc,\n"),
        ("tags.csv", '\ufeffFilename, Tags\r\nimages/a.jpg,"dog,cat"\r\nb.v2,3\r\nc.jpg,""\r\n'),
        ("tags.csv", "filename,tags\na,dog;cat\n\nb.v2,potted plant;\nc,\n"),
        ("tags.csv", "filename,tags\na,1,2\nb.v2,3\nc,\n"),
        ("tags.txt", "a 1 0\nb.v2 2 \n\nc\n"),
    ],
)
def test_text_formats_give_sorted_class_ids(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content, "utf-8", newline="")
    tags = read(path)
    assert tags.by_image == {"a": (1, 2), "b.v2": (3,), "c": ()}
    assert tags.source.startswith(f"{name} (")


def test_text_lists_count_ids_from_zero(tmp_path: Path) -> None:
    path = tmp_path / "tags.txt"
    path.write_text("a 0\nother 3\nc cat\n")
    (line,) = faults_of(path)
    assert line == f"{path}: other has class id 3, but ids are 0..2 here; correct it"


def test_annotations_include_difficult_objects_but_not_parts(tmp_path: Path) -> None:
    person = "<object><name>dog</name><difficult>1</difficult><part><name>head</name></part></object>"
    (tmp_path / "a.xml").write_text(f"<annotation>{person}<object><name>cat</name></object>{person}</annotation>")
    (tmp_path / "unlisted.xml").write_text("not XML, but never read")
    tags = read(tmp_path, ("a", "untagged"))
    assert tags.by_image == {"a": (1, 2)}
    assert "difficult" in tags.source


def test_broken_annotation_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("<annotation><object>")
    (line,) = faults_of(tmp_path, ("a",))
    assert line.startswith(f"{tmp_path}/a.xml: cannot be read")


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("key", ["2007_000032", 2007000032, np.int32(2007000032)])
def test_label_dict_with_string_or_integer_keys(tmp_path: Path, protocol: int, key: Any) -> None:
    path = tmp_path / "cls_labels.npy"
    with path.open("wb") as file:
        array = np.array({key: vector(1, 3), "other": vector()}, dtype=object)
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        pickle.dump(array, file, protocol=protocol)
    tags = read(path)
    assert tags.by_image == {"2007_000032": (1, 3), "other": ()}
    assert path.name in tags.source


def test_label_dict_as_numpy_saves_it(tmp_path: Path) -> None:
    path = save_labels(tmp_path / "labels.npy", {"a": vector(2).astype(">f8")})
    assert read(path).by_image == {"a": (2,)}


class Payload:
    """Runs a command when numpy or pickle unpickles it."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("where", ["value", "key", "outside"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, where: str) -> None:
    proof = tmp_path / "ran"
    payload = Payload(os.mkdir, str(proof))
    content = {"value": {"a": payload}, "key": {payload: vector(1)}, "outside": {"a": vector(1), "b": [payload]}}[where]
    path = save_labels(tmp_path / "labels.npy", content)
    (line,) = faults_of(path)
    assert line.startswith(f"{path}: not a label file")
    assert "mkdir" in line
    assert not proof.exists()
    np.load(path, allow_pickle=True)
    assert proof.exists()  # the attack works with numpy


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a": [1, 0]}, "not an image id with an array"),
        ({"a": np.array(["x"])}, "something other than numeric arrays"),
        ({"a": np.array([None])}, "something other than numeric arrays"),
        ([vector(1)], "not a dict"),
        ({"a": vector()[:2]}, "a has 2 values for 3 classes"),
        ({"2007_000032": vector(1), 2007000032: vector(2)}, "2007_000032 is tagged twice"),
        ({"a": Payload(eval, "1")}, "builtins.eval"),
        ({"a": Payload(getattr, "", "join")}, "builtins.getattr"),
    ],
)
def test_other_pickles_are_refused(tmp_path: Path, content: Any, said: str) -> None:
    path = save_labels(tmp_path / "labels.npy", content)
    (line,) = faults_of(path)
    assert line.startswith(f"{path}: ")
    assert said in line


def test_damaged_label_file_is_refused_in_one_line(tmp_path: Path) -> None:
    whole = save_labels(tmp_path / "labels.npy", {"a": vector(1), "b": vector(2)}).read_bytes()
    path = tmp_path / "damaged.npy"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        (line,) = faults_of(path)
        assert line.startswith(f"{path}: not a label file like cls_labels.npy")
        assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.json", '{"a": ["cta"]}', "a has the unknown tag 'cta'; did you mean cat?"),
        ("t.json", '{"a": [0]}', "a has class id 0, but ids are 1..3 here"),
        ("t.json", '{"a": [4]}', "a has class id 4, but ids are 1..3 here"),
        ("t.json", '{"a": [true]}', "unknown tag True"),
        ("t.json", '{"a": [1.0]}', "unknown tag 1.0"),
        ("t.json", '{"a": null}', "the tags of a must be a list"),
        ("t.json", '{"a": [1], "a": [2]}', "a is tagged twice"),
        ("t.json", '{"a": [1], "a.jpg": [2]}', "a is tagged twice"),
        ("t.json", '[["a", [1]]]', "must be a mapping"),
        ("t.json", '{"a": [1]', "is not JSON"),
        ("t.csv", "filename,tags\na.jpg,zebra\n", "unknown tag 'zebra'"),
        ("t.txt", "a x\n", "unknown tag 'x'"),
        ("t.yaml", "", "is empty; write a line for each photo"),
    ],
)
def test_faults_name_the_file_and_the_fix(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    (line,) = faults_of(path)
    assert line.startswith(f"{path}: ")
    assert said in line


@pytest.mark.parametrize("name", ["tags.json", "tags.csv", "tags.txt", "tags.npy"])
def test_a_missing_tag_file_is_one_line(tmp_path: Path, name: str) -> None:
    (line,) = faults_of(tmp_path / name)
    assert line.startswith(f"{tmp_path / name}: cannot be read as tag file (No such file")


@pytest.mark.parametrize("encoding", ["latin1", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_text_in_any_usual_encoding(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "tags.csv"
    path.write_bytes("filename,tags\nk\xe4fer,cat\n".encode(encoding))
    assert read(path, ("k\xe4fer",)).by_image == {"k\xe4fer": (1,)}


@pytest.mark.parametrize(
    "text",
    [
        "a\nb\n",
        "/JPEGImages/a.jpg /SegmentationClassAug/a.png\n/JPEGImages/b.jpg /SegmentationClassAug/b.png\n",
        "a 0 14 \nb 19 \n",
        "\ufeffa\r\n\r\n  b  \r\n",
    ],
)
def test_image_lists(tmp_path: Path, text: str) -> None:
    path = tmp_path / "train.txt"
    path.write_text(text, "utf-8", newline="")
    faults = Faults()
    assert read_list(path, faults) == ["a", "b"]
    assert faults.lines() == []


@pytest.mark.parametrize(
    ("text", "said"), [("a\nb\na.jpg\n", "a is listed twice (lines 1 and 3); remove one"), ("\n", "names no image")]
)
def test_faulty_lists(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "train.txt"
    path.write_text(text)
    faults = Faults()
    read_list(path, faults)
    (line,) = faults.lines()
    assert line.startswith(f"{path}: ")
    assert said in line


def test_many_faults_of_a_kind_are_counted() -> None:
    faults = Faults()
    faults.check()  # raises nothing
    for number in range(LIMIT + 317):
        faults.add("missing image", f"{number}.jpg: missing")
    faults.add("mask", "one of another kind")
    with pytest.raises(PipelineError) as caught:
        faults.check()
    lines = caught.value.lines
    assert len(lines) == LIMIT + 2
    assert lines[LIMIT] == "... and 317 more of this kind (missing image)"
    assert lines[-1] == "one of another kind"
    assert len(faults) == LIMIT + 317 + 1


@with_lists
def test_the_fields_own_files_give_the_known_figures() -> None:
    faults = Faults()
    lists = {name: read_list(LISTS / name, faults) for name in ("psa_train.txt", "psa_val.txt", "psa_train_aug.txt")}
    assert [len(ids) for ids in lists.values()] == [1464, 1449, 10582]
    ids = lists["psa_train_aug.txt"]
    assert read_list(LISTS / "drs_train_aug_cls.txt", faults) == ids
    photos = {name: f"{name}.jpg" for name in [*ids, *lists["psa_val.txt"]]}
    boxes = read_tags(LISTS / "psa_cls_labels.npy", VOC, photos, faults).by_image
    text = read_tags(LISTS / "drs_train_aug_cls.txt", VOC, photos, faults).by_image
    assert faults.lines() == []
    assert len(boxes) == 12031
    assert sum(len(boxes[name]) for name in ids) == 16458
    assert sum(len(text[name]) for name in ids) == 15555
    assert sum(boxes[name] != text[name] for name in ids) == 817
    assert all(set(text[name]) <= set(boxes[name]) for name in ids)


@with_lists
@with_mini
def test_json_and_label_dict_agree() -> None:
    ids = [path.stem for path in (MINI / "JPEGImages").iterdir()]
    mini = read(MINI / "tags.json", ids, classes=VOC).by_image
    assert len(mini) == 1449
    boxes = cls_labels.load(LISTS / "psa_cls_labels.npy")
    for name, tags in mini.items():
        assert tuple((np.flatnonzero(boxes[name]) + 1).tolist()) == tags
    assert json.loads((MINI / "tags.json").read_text()) == {name: list(tags) for name, tags in mini.items()}
