"""``wsss new``: every kind of tags, the split, the profile and the summary."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.config.params import load
from pipeline.networks.backbones import backbone_faults
from pipeline.workflow.graph import Graph
from tests.project import ROOT
from tests.tagged import PHOTOS, TAGS, checkout, picture, rows, table, text  # noqa: F401
from tests.trained import command
from wsss import recipe, split


def row_a_tag() -> str:
    pairs = [[name, tag] for name, tags in TAGS.items() for tag in tags]
    return rows("lang.csv", [["Datei", "Schlagwort"], *pairs], ";")


def column_a_class() -> str:
    marks = [[name, int("cat" in tags), int("dog" in tags)] for name, tags in TAGS.items()]
    return rows("_classes.csv", [["filename", "cat", "dog"], *marks])


def mapping() -> str:
    return text("tags.json", {Path(name).stem: tags for name, tags in TAGS.items()})


def coco() -> str:
    images = [{"id": number, "file_name": name, "width": 60, "height": 40} for number, name in enumerate(TAGS)]
    marks = [
        {
            "id": 10 * number + place,
            "image_id": number,
            "category_id": 1 + ["cat", "dog"].index(tag),
            "bbox": [1, 1, 9, 9],
        }
        for number, tags in enumerate(TAGS.values())
        for place, tag in enumerate(tags)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return text("coco.json", {"images": images, "annotations": marks, "categories": categories})


def label_studio() -> str:
    tasks = []
    for name, tags in TAGS.items():
        result = (
            [{"type": "choices", "from_name": "tag", "to_name": "image", "value": {"choices": tags}}] if tags else []
        )
        tasks.append({"data": {"image": f"/data/upload/1/{name}"}, "annotations": [{"result": result}]})
    return text("studio.json", tasks)


def cvat() -> str:
    images = "".join(
        f'<image id="{number}" name="{name}" width="60" height="40">'
        + "".join(f'<tag label="{tag}" source="manual"></tag>' for tag in tags)
        + "</image>"
        for number, (name, tags) in enumerate(TAGS.items())
    )
    return text(
        "cvat.xml", f"<?xml version='1.0' encoding='utf-8'?><annotations><version>1.1</version>{images}</annotations>"
    )


def voc_xml() -> str:
    for name, tags in TAGS.items():
        objects = "".join(f"<object><name>{tag}</name></object>" for tag in tags)
        text(f"Annotations/{Path(name).stem}.xml", f"<annotation><filename>{name}</filename>{objects}</annotation>")
    return "Annotations"


@pytest.mark.parametrize(
    "tags", [table, row_a_tag, column_a_class, mapping, coco, label_studio, cvat, voc_xml], ids=lambda one: one.__name__
)
def test_every_kind_of_tags(tags: Callable[[], str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("new", PHOTOS, tags(), "--name", "pets", "--weights", "none", "--negatives") == 0
    written = json.loads(Path("data/pets/tags.json").read_text(encoding="utf-8"))
    assert written == {Path(name).stem: sorted(tags) for name, tags in TAGS.items()}
    assert Path("data/pets/classes.txt").read_text() == "cat\ndog\n"
    lists = [Path(f"data/pets/{name}.txt").read_text().splitlines() for name in ("train", "evaluation")]
    assert sorted(lists[0] + lists[1]) == sorted(written)
    printed = capsys.readouterr().out
    assert f"photos:    8: {len(lists[0])} to train on, {len(lists[1])} held out" in printed
    assert "classes:   2: cat 4, dog 3" in printed
    assert "negatives: 2 photos without any class" in printed
    assert printed.endswith("next:      wsss run pets\n")


def test_a_folder_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(6):
        picture(Path(f"sorted/{'cats' if number % 2 else 'big dogs'}/{number}.jpg"), number)
    assert command("new", "sorted", "sorted", "--weights", "none") == 0
    assert "classes:   2: big dogs 3, cats 3" in capsys.readouterr().out


def test_the_profile_is_valid_and_plans(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads((ROOT / "params.schema.json").read_text())
    (Path("maps")).mkdir()
    for name in TAGS:
        Image.new("L", (60, 40), 200).save(f"maps/{Path(name).stem}.png")
    for options, row in (((), "cam_irn"), (("--saliency", "maps"), "oaa")):
        assert command("new", PHOTOS, table(), "--weights", "none", "--force", *options) == 0
        profile = Path("profiles/mine.yaml")
        jsonschema.validate(yaml.safe_load(profile.read_text()), schema)
        params = load([Path("params.yaml"), profile], resolve=True)
        assert list(params.segmentations) == [row] == [params.method]
        assert Graph(params).missing() == []
        capsys.readouterr()
        assert command("run", "mine", "-n") == 0
        planned = capsys.readouterr().out
        assert f"prediction {row}" in planned
        assert ("walk cam_irn" in planned) == (row == "cam_irn")
        others = [line.partition("# - ")[2].split()[0] for line in profile.read_text().splitlines() if "  # - " in line]
        with_all = load([Path("params.yaml"), profile], {"rows": [row, *others]}, resolve=True)
        assert set(with_all.segmentations) == {row, *others}  # the rows in comments work as well
        assert others


@pytest.mark.parametrize("weights", [None, "imagenet", "../w.pth"])
@pytest.mark.parametrize("cards", [0, 2])
@pytest.mark.parametrize("saliency", [None, "maps: 1"])
def test_every_profile_is_valid(weights: str | None, cards: int, saliency: str | None, tmp_path: Path) -> None:
    machine = recipe.Machine(cards, 4)
    named = recipe.backbone(weights, machine)
    source = recipe.Source("x", "data/x", "../#1 'odd'", "m", saliency, weights, named, 3, 900, 100, "wsss new")
    path = tmp_path / "x.yaml"
    path.write_text(recipe.write(source, machine))
    params = load([ROOT / "params.yaml", path], resolve=True)
    assert params.dataset.images == "../#1 'odd'"
    assert params.saliency.path == saliency
    (segmentation,) = params.segmentations.values()
    assert bool(segmentation.backbone.frozen) == (weights is not None)
    assert backbone_faults(segmentation.backbone) == ()
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads((ROOT / "params.schema.json").read_text()))


@pytest.mark.parametrize("kind", ["cpu", "gpu", "scratch"])
def test_trainings_of_few_and_of_many_photos(kind: str) -> None:
    size = recipe.SIZES[kind]
    counts = [60, 200, 1_000, 10_000, 100_000]
    epochs = [size.count_epochs(count) for count in counts]
    assert epochs == sorted(epochs, reverse=True)
    assert epochs[-1] >= 1
    steps = [epoch * -(-count // size.batch) for epoch, count in zip(epochs, counts, strict=True)]
    assert steps == sorted(steps)
    assert steps[1] >= 0.9 * size.steps[0]  # 200 photos are seen often enough
    assert steps[-1] <= max(size.steps[1], -(-counts[-1] // size.batch)) * 1.1


def test_the_split_is_even_over_the_classes_and_stays() -> None:
    random = np.random.default_rng(0)
    tags = {f"p{number}": {f"c{one}" for one in random.integers(0, 9, number % 4)} for number in range(400)}
    tags["rare 1"] = tags["rare 2"] = {"rare"}
    tags["only"] = {"only"}
    train, evaluation = split.draw(tags, 0.1, seed=1)
    assert sorted(train + evaluation) == sorted(tags)
    every, held = (Counter(tag for name in names for tag in tags[name]) for names in (tags, evaluation))
    for tag, count in every.items():
        assert 0 <= held[tag] - max(0.1 * count - 1, 0) <= 4, tag
    assert held["rare"] == 1
    assert held["only"] == 0
    assert 35 <= len(evaluation) <= 50
    assert split.draw(tags, 0.1, seed=1) == (train, evaluation)
    assert split.draw(tags, 0.1, seed=2)[1] != evaluation
    more = split.draw({**tags, "new": {"c1"}}, 0.1, seed=1)[1]
    assert len(set(more) ^ set(evaluation)) <= 4


def test_of_two_photos_one_is_held_out_and_only_candidates_are() -> None:
    assert [len(part) for part in split.draw({"a": {"x"}, "b": {"y"}}, 0.1, 1)] == [1, 1]
    names = {f"p{number}": {"x"} for number in range(50)}
    assert set(split.draw(names, 0.5, 1, candidates={"p3", "p4"})[1]) == {"p3", "p4"}


def test_photos_of_the_same_picture_stay_together(capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(12):
        with Image.open(PHOTOS / "e.jpg") as original:
            original.resize((90, 60)).save(PHOTOS / f"copy {number}.jpg", quality=80)
    tags = {Path(name).stem: tags for name, tags in TAGS.items()} | {f"copy {number}": ["dog"] for number in range(12)}
    assert command("new", PHOTOS, text("t.json", tags), "--weights", "none", "--evaluation", "0.4") == 0
    held = Path("data/mine/evaluation.txt").read_text().splitlines()
    assert sum(name.startswith("copy") or name == "e" for name in held) in (0, 13)


def test_photos_are_neither_copied_nor_changed_and_nothing_is_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    def state() -> dict[str, tuple[str, int]]:
        files = sorted(PHOTOS.iterdir())
        return {file.name: (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns) for file in files}

    before = state()
    assert command("new", PHOTOS, table(), "--weights", "none") == 0
    assert state() == before
    assert sorted(path.name for path in Path("data/mine").iterdir()) == [
        "classes.txt",
        "evaluation.txt",
        "tags.json",
        "train.txt",
    ]
    own = Path("profiles/mine.yaml")
    own.write_text("# mine\n")
    assert command("new", PHOTOS, table(), "--weights", "none") == 1
    assert "profiles/mine.yaml, data/mine/classes.txt" in capsys.readouterr().err
    assert own.read_text() == "# mine\n"
    assert command("new", PHOTOS, table(), "--weights", "none", "--force") == 0
    assert own.read_text().startswith("# yaml-language-server")


def test_classes_to_leave_out_make_negatives_and_masks_choose_the_evaluation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("masks").mkdir()
    for name in ("c", "e", "Käfer 1"):
        values = np.zeros((40, 60), np.uint8)
        values[:20] = 1 if name != "e" else 0
        Image.fromarray(values).save(f"masks/{name}.png")
    options = ("--leave-out", "DOG", "--masks", "masks", "--evaluation", "0.3", "--weights", "none")
    assert command("new", PHOTOS, table(), *options) == 0
    printed = capsys.readouterr().out
    assert "classes:   1: cat 4" in printed
    assert "negatives: 4 photos without any class" in printed
    assert set(Path("data/mine/evaluation.txt").read_text().splitlines()) <= {"c", "e", "Käfer 1"}
    assert "supervised" in Path("profiles/mine.yaml").read_text()
