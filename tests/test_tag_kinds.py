"""Tag files of the kinds that people have: each is told apart by its content and gives the same tags."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.faults import Faults
from pipeline.data.tags import Collected, collect, read_tags

PHOTOS = {"zoo/Mieze 1": "zoo/Mieze 1.JPG", "zoo/b": "zoo/b.png", "c": "c.jpg", "d": "d.jpg"}
EXPECTED = {"zoo/Mieze 1": ("cat", "traffic light"), "zoo/b": ("dog",), "c": ()}
CLASSES = ("cat", "dog", "traffic light")


def coco() -> dict[str, Any]:
    """COCO's instances: an id may be text, an annotation may have no box."""
    images = [
        {"id": "1", "file_name": "zoo/Mieze 1.JPG"},
        {"id": 2, "file_name": "images/b.png"},
        {"id": 3, "file_name": "c.jpg"},
    ]
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4]},
        {"id": 2, "image_id": "1", "category_id": 9, "iscrowd": 1},
        {"id": 3, "image_id": 2, "category_id": 8},
    ]
    categories = [
        {"id": 0, "name": "zoo"},
        *({"id": n, "name": name} for n, name in zip((7, 8, 9), CLASSES, strict=True)),
    ]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def region(kind: str, *names: str) -> dict[str, Any]:
    return {"id": "x", "type": kind, "from_name": "tag", "to_name": "image", "value": {"x": 1.5, kind: list(names)}}


STUDIO = [
    {
        "id": 1,
        "data": {"image": "/data/upload/3/0123abcd-Mieze_1.JPG"},
        "annotations": [
            {"was_cancelled": True, "result": [region("choices", "dog")]},
            {"was_cancelled": False, "result": [region("choices", "cat", "traffic light")]},
        ],
    },
    {
        "id": 2,
        "data": {"image": "/data/local-files/?d=photos/zoo%2Fb.png"},
        "annotations": [{"result": [region("brushlabels", "dog"), region("rectanglelabels", "dog")]}],
        "predictions": [{"result": [region("choices", "cat")]}],
    },
    {"id": 3, "data": {"image": "https://example.org/x/c.jpg?size=1"}, "annotations": [{"result": []}]},
    {"id": 4, "data": {"image": "d.jpg"}, "annotations": [], "predictions": []},
]
STUDIO_MIN = [
    {"image": "/data/upload/3/0123abcd-Mieze_1.JPG", "annotator": 1, "choice": {"choices": ["cat", "traffic light"]}},
    {"image": "s3://bucket/zoo/b.png", "id": 2, "choice": "dog", "annotator": 1, "annotation_id": 5, "lead_time": 1.5},
    {"image": "c.jpg", "id": 3, "annotator": 1, "annotation_id": 6, "lead_time": 2.5},
]
CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><task><labels>
<label><name>cat</name></label><label><name>dog</name></label>
<label><name>traffic light</name></label></labels></task></meta>
<image id="0" name="zoo/Mieze 1.JPG" width="4" height="4"><tag label="cat" source="manual"></tag>
<polygon label="traffic light" points="0,0;1,1;2,0"><attribute name="label">dog</attribute></polygon></image>
<image id="1" name="b.png" width="4" height="4"><mask label="dog" rle="1" left="0" top="0"/></image>
<image id="2" name="c.jpg" width="4" height="4"></image></annotations>"""
M = "zoo/Mieze 1.JPG"
FILES: dict[str, tuple[str, str | bytes]] = {
    "CSV, a row an image (delimiter ',')": ("t.csv", f"filename,tags\n{M},cat;traffic light\nzoo/b.png,dog\nc.jpg,\n"),
    "CSV, a row a tag (delimiter ';'), Windows-1252": (
        "t.csv",
        f"Größe;Datei;Tier\r\n1;{M};cat\r\n2;b.png;dog\r\n3;{M};traffic light\r\n4;c.jpg;\r\n".encode("latin1"),
    ),
    "CSV, a row an object (delimiter ',')": (
        "t.csv",
        f"{M},1,2,3,4,cat\n{M},1,2,3,4, traffic light \nC:\\x\\b.png,1,2,3,4,dog\nc.jpg,,,,,\n",
    ),
    "CSV, a column a class (delimiter ',')": (
        "_classes.csv",
        f"filename, cat, dog, traffic light\n{M}, 1, 0, 1\nzoo/b.png, 0, 1, 0\nc.jpg, 0, 0, 0\n",
    ),
    "CSV, a column a class (delimiter tab), UTF-16": (
        "t.tsv",
        f"cat\tPhoto\tdog\ttraffic light\nTRUE\t{M}\t\tTRUE\nFALSE\tb\tx\t\nFALSE\tc\t\t\n".encode("utf-16"),
    ),
    "JSON {id: [class]}": ("t.json", json.dumps({M: ["cat", "traffic light"], "ZOO/B.PNG": ["dog"], "c": []})),
    "JSON {id: {class: 0 or 1}}": (
        "t.json",
        json.dumps(
            {
                M: {"cat": 1, "dog": 0, "traffic light": True},
                "b": {"cat": 0, "dog": 1, "traffic light": 0},
                "c": {"cat": 0, "dog": 0, "traffic light": 0},
            }
        ),
    ),
    "JSON records {file, tags}": (
        "t.jsonl",
        "\n".join(
            json.dumps({"file_name": name, "tags": tags})
            for name, tags in ((M, ["cat", "traffic light"]), ("b.png", ["dog"]), ("c.jpg", []))
        ),
    ),
    "COCO JSON": ("t.json", json.dumps(coco())),
    "Label Studio JSON": ("t.json", json.dumps(STUDIO)),
    "Label Studio JSON-MIN": ("t.json", json.dumps(STUDIO_MIN)),
    "CVAT XML": ("annotations.xml", CVAT),
    "text lines ID TAG ...": ("t.txt", f"{M} cat;traffic light\nb dog\nc\n"),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_gives_the_same_tags(tmp_path: Path, kind: str) -> None:
    name, content = FILES[kind]
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    faults = Faults()
    found = collect(path, PHOTOS, faults)
    assert faults.lines() == []
    assert found.kind == kind
    assert found.by_photo == EXPECTED
    assert sorted(found.classes) == list(CLASSES)
    assert found.without_entry == ["d"]
    assert found.unmatched == []
    tags = read_tags(path, CLASSES, PHOTOS, faults)
    assert faults.lines() == []
    assert tags.by_image == {"zoo/Mieze 1": (1, 3), "zoo/b": (2,), "c": ()}
    assert tags.source == f"{name} ({kind})"


def collected(folder: Path, photos: dict[str, str] = PHOTOS) -> Collected:
    faults = Faults()
    found = collect(folder, photos, faults)
    assert faults.lines() == []
    return found


def test_a_folder_of_voc_xml(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    names = {"sub/Mieze 1.XML": ("cat", "traffic light"), "other.xml": ("dog",), "c.xml": ()}
    for name, classes in names.items():
        objects = "".join(f"<object><name> {each} </name></object>" for each in classes)
        (tmp_path / name).write_text(f"<annotation><filename>b.png</filename>{objects}</annotation>")
    found = collected(tmp_path)
    assert found.by_photo == EXPECTED
    assert found.kind.startswith("VOC XML")


def test_a_folder_of_labelme_json(tmp_path: Path) -> None:
    for name, classes in EXPECTED.items():
        shapes = [{"label": each, "points": [[0, 0]]} for each in classes]
        (tmp_path / f"{Path(name).name}.json").write_text(json.dumps({"shapes": shapes, "flags": {}}))
    assert collected(tmp_path).by_photo == EXPECTED


def test_a_folder_a_class(tmp_path: Path) -> None:
    ids = ("train/cat/1", "train/dog/1", "val/Cat/3", "4", "negative/5")
    photos = {name: f"{name}.jpg" for name in ids}
    for file in photos.values():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    found = collected(tmp_path, photos)
    assert found.kind == "a folder a class"
    assert found.by_photo == {"train/cat/1": ("cat",), "train/dog/1": ("dog",), "val/Cat/3": ("cat",), "negative/5": ()}
    assert found.without_entry == ["4"]


def test_copies_in_class_folders_add_up(tmp_path: Path) -> None:
    for file in ("cat/Mieze 1.JPG", "traffic light/Mieze 1.JPG", "dog/b.png"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert collected(tmp_path).by_photo == {name: tags for name, tags in EXPECTED.items() if tags}


def test_an_export_of_roboflow_with_a_file_a_split(tmp_path: Path) -> None:
    for split, rows in (("train", "1.jpg, 1, 0\n"), ("valid", "1.jpg, 0, 1\n")):
        (tmp_path / split).mkdir()
        (tmp_path / split / "_classes.csv").write_text(f"filename, cat, dog\n{rows}")
    photos = {"train/1": "train/1.jpg", "valid/1": "valid/1.jpg"}
    assert collected(tmp_path, photos).by_photo == {"train/1": ("cat",), "valid/1": ("dog",)}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (["cat dog", "cat", "dog"], {"cat", "dog"}),  # each word is a tag elsewhere
        (["traffic light", "traffic sign", "cat"], {"traffic light", "traffic sign", "cat"}),
        (["cat|dog", "cat , bird"], {"cat", "dog", "bird"}),
        (["['cat', 'dog']", '["cat"]', "[]"], {"cat", "dog"}),  # lists as pandas writes them
        (["Cat", "cat", "cat", "traffic_light", "Traffic  Light"], {"cat", "traffic_light"}),
        (["1 2", "2"], {"1", "2"}),
        (["9" * 5000, "2"], {"9" * 5000, "2"}),  # more digits than Python converts
    ],
)
def test_tags_in_a_field_before_the_classes_are_known(tmp_path: Path, fields: list[str], expected: set[str]) -> None:
    assert set(collected(*table_of(tmp_path, fields)).classes) == expected


def table_of(folder: Path, fields: list[str]) -> tuple[Path, dict[str, str]]:
    """A CSV file with a row for each field, and its photos."""
    path = folder / "t.csv"
    rows = "".join('p{}.jpg,"{}"\n'.format(n, text.replace('"', '""')) for n, text in enumerate(fields))
    path.write_text(f"image,label\n{rows}")
    return path, {f"p{n}": f"p{n}.jpg" for n in range(len(fields))}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (["cat dog", "dog cat", "bird"], "'cat dog' may be one class or the tags cat and dog, and so may 1 more; "),
        (
            ["bird cat", "bird dog", "cat dog"],
            "'bird cat' may be one class or the tags bird and cat, and so may 2 more; ",
        ),
        (["cat dog", "cat", "dog", "golden retriever"], "'cat dog' may be one class or the tags cat and dog; "),
        (["bird cat dog", "cat dog", "bird cat"], "'bird cat dog' may be one class or the tags bird and cat and dog"),
        (["Cat dog;fox", "dog CAT"], "'Cat dog' may be one class or the tags Cat and dog, and so may 1 more; "),
    ],
)
def test_tags_whose_words_recur_are_refused_until_the_user_decides(
    tmp_path: Path, fields: list[str], said: str
) -> None:
    path, photos = table_of(tmp_path, fields)
    faults = Faults()
    collect(path, photos, faults)
    (line,) = faults.lines()
    assert line.startswith(f"{path}: {said}")
    assert line.endswith("add --blanks separate if blanks separate tags, or --blanks belong if they belong to names")
    words = {word.casefold() for field in fields for word in field.replace(";", " ").split()}
    assert {name.casefold() for name in decided(path, photos, "separate").classes} == words
    names = {frozenset(name.split()) for name in decided(path, photos, "belong").classes}
    assert names == {frozenset(name.split()) for field in fields for name in field.split(";")}


def decided(path: Path, photos: dict[str, str], blanks: Any) -> Collected:
    faults = Faults()
    found = collect(path, photos, faults, blanks)
    assert faults.lines() == []
    assert not any("blanks" in line for line in found.remarks)
    return found


@pytest.mark.parametrize(
    "names",
    [
        ["golden retriever", "labrador retriever", "cat"],
        ["traffic light", "street light", "traffic sign", "street sign"],
        ["sea lion", "lion", "polar bear", "bear"],
        ["hot dog", "dog", "potted plant", "tv monitor"],
        ["light bulb", "traffic light"],
        ["traffic light", "street light", "traffic"],
        ["cat dog"],
    ],
)
def test_names_with_blanks_stay_whole(tmp_path: Path, names: list[str]) -> None:
    path, photos = table_of(tmp_path, [*names, f"{names[0]};{names[-1]}"])
    found = collected(path, photos)
    assert set(found.classes) == set(names)
    example = next(name for name in names if " " in name)
    assert found.remarks == [f"blanks belong to class names, such as '{example}'; --blanks separate splits them"]


def test_what_fits_no_photo_is_listed_with_the_nearest_names(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("filename,tags\nMieze 2.jpg,cat\nqqqq.jpg,dog\nzoo/b.png,dog\n")
    found = collected(path)
    assert found.unmatched == [
        "Mieze 2.jpg: no photo has this name; similar: zoo/Mieze 1",
        "qqqq.jpg: no photo has this name",
    ]


def test_base_names_count_only_where_they_are_unique(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("filename,tags\n1.jpg,cat\nx/b/1.jpg,dog\n")
    faults = Faults()
    found = collect(path, {"a/1": "a/1.jpg", "b/1": "b/1.jpg"}, faults)
    assert found.by_photo == {"b/1": ("dog",)}
    assert faults.lines() == [f"{path}: 1.jpg may be a/1, b/1; write its path below the photos' folder"]


@pytest.mark.parametrize("tag", ["Cat", " CAT ", "traffic_light", "Traffic-Light", "traffic  light"])
def test_class_names_fold_case_and_blanks(tmp_path: Path, tag: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"c": [tag]}))
    faults = Faults()
    (ids,) = read_tags(path, CLASSES, PHOTOS, faults).by_image.values()
    assert ids == ((1,) if "c" in tag.lower()[:2] else (3,))
    assert faults.lines() == []


def test_an_ambiguous_class_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"c": ["CAT"], "d": ["Cat"]}')
    faults = Faults()
    assert read_tags(path, ("cat", "Cat"), PHOTOS, faults).by_image["d"] == (2,)
    assert faults.lines() == [f"{path}: c has the tag 'CAT', which may be cat or Cat"]


def test_other_classes_are_refused_once_each_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"c": ["zebra", "cat"], "d": ["zebra"], "zoo/b": ["dgo"]}')
    faults = Faults()
    read_tags(path, CLASSES, PHOTOS, faults)
    assert faults.lines() == [
        f"{path}: c and 1 more have the unknown tag 'zebra'; correct it, add it to dataset.classes, or leave out such "
        "classes: set dataset.other_classes to leave_out",
        f"{path}: zoo/b has the unknown tag 'dgo'; did you mean dog?, or leave out such classes: set "
        "dataset.other_classes to leave_out",
    ]
    faults = Faults()
    tags = read_tags(path, CLASSES, PHOTOS, faults, other_classes="leave_out")
    assert faults.lines() == []
    assert tags.by_image == {"c": (1,), "d": (), "zoo/b": ()}
    assert tags.remarks == ["classes of the tags that are left out: zebra (2 images), dgo (1 images, similar to dog)"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.xlsx", b"PK\x03\x04rest", "is a ZIP file or a spreadsheet (.xlsx, .ods); save the sheet as CSV"),
        ("t.csv", "filename,date,place\nc.jpg,monday,rome\nd.jpg,friday,oslo\n", "title the column of tags 'tags'"),
        ("t.csv", "filename,tags\n,cat\nc.jpg,dog\n", "line 2 names no photo"),
        (
            "t.json",
            '{"images": [{"id": 1, "file_name": "c.jpg"}], "annotations": [{"image_id": 1, "category_id": 5}], '
            '"categories": [{"id": 1, "name": "cat"}]}',
            "category_id 5 of 1 annotations is not among its categories",
        ),
        ("t.json", '[{"a": 1}]', "a list of records whose keys (a) name no photo"),
        ("t.xml", "<annotations><track id='0' label='cat'/></annotations>", "is 'CVAT for video'"),
        ("t.xml", "<html></html>", "is XML with the root <html>"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    faults = Faults()
    collect(path, PHOTOS, faults)
    (line,) = faults.lines()
    assert line.startswith(f"{path}: ")
    assert said in line
