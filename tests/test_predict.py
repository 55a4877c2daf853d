"""``wsss predict``: any photos, whatever their names; only what is missing; broken ones are named."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import wsss
from tests.trained import MODEL, command, mask, photo

ROOT = Path(__file__).parent.parent


ODD = (
    "my photo.JPG",
    "Größe 猫.png",
    "a/x.jpg",
    "b/x.jpg",
    "a/x.png",
    "b/.hidden.jpg",
    "b/notes.md",
    "d.webp",
    "e.tif",
)


def test_predict_writes_what_the_library_returns(folder: Path, model: wsss.Model) -> None:
    for number, name in enumerate(ODD):
        if name.endswith(".md"):
            Path(f"photos/{name}").write_text("text")
        else:
            photo(Path(f"photos/{name}"), number)
    assert command("predict", MODEL, "photos", "--out", "out", "--formats", "png,csv") == 0
    written = {path.relative_to("out/masks").as_posix() for path in Path("out/masks").rglob("*.png")}
    expected = {"my photo": "my photo.JPG", "Größe 猫": "Größe 猫.png", "a/x": "a/x.jpg", "a/x.png": "a/x.png"}
    expected |= {"b/x": "b/x.jpg", "d": "d.webp", "e": "e.tif"}
    assert written == {f"{name}.png" for name in expected}
    for name, source in expected.items():
        assert np.array_equal(mask(Path(f"out/masks/{name}.png")), model.predict(f"photos/{source}").mask)
    with Path("out/summary.csv").open(encoding="utf-8-sig") as file:
        assert {row["photo"] for row in csv.DictReader(file)} == set(expected.values())
    assert not list(Path("out").rglob("*.partial"))


def test_predict_reads_files_lists_and_stdin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one.jpg", "two words.jpg", "lists/three.jpg", "four", "tree/five.jpg"):
        path = Path(name)
        photo(path.with_suffix(".jpg")).rename(path)
    Path("lists/list.txt").write_text("\ufeff../two words.jpg\r\nthree.jpg\r\n\r\none.jpg\r\n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO("tree\n"))
    assert command("predict", MODEL, "one.jpg", "lists/list.txt", "four", "-", "--out", "out") == 0
    names = {path.relative_to("out/masks").as_posix() for path in Path("out/masks").rglob("*.png")}
    assert names == {"one.png", "two words.png", "lists/three.png", "four.png", "five.png"}


def times(pattern: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in Path("out").rglob(pattern)}


def test_predict_again_does_only_what_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        photo(Path(f"photos/{number}.png"), number)
    arguments = ("predict", MODEL, "photos", "--out", "out", "--formats")
    assert command(*arguments, "png,coco") == 0
    before = times("*.png")
    photo(Path("photos/1.png"), 11)
    Path("out/masks/2.png").unlink()
    photo(Path("photos/4.png"), 4)
    assert command(*arguments, "png,coco") == 0
    assert "3 photos segmented, 2 up to date" in capsys.readouterr().out
    after = times("*.png")
    assert {name for name in after if after[name] != before.get(name)} == {"1.png", "2.png", "4.png"}
    assert command(*arguments, "png") == 0
    assert "0 photos segmented, 5 up to date" in capsys.readouterr().out
    assert command(*arguments, "overlay") == 0  # a new format; the others stay up to date
    assert "5 photos segmented" in capsys.readouterr().out
    assert command(*arguments, "png,overlay,coco") == 0
    assert "0 photos segmented, 5 up to date" in capsys.readouterr().out
    assert len(json.loads(Path("out/coco_rle.json").read_text())["images"]) == 5
    assert command(*arguments, "png,coco", "--megapixels", "0.001") == 0  # other options
    assert "5 photos segmented" in capsys.readouterr().out
    assert command("predict", MODEL, "photos/1.png", "--out", "out", "--formats", "coco") == 0
    assert "4 photos of earlier runs with another model" in capsys.readouterr().out
    assert len(json.loads(Path("out/coco_rle.json").read_text())["images"]) == 1


def test_a_second_folder_with_equal_names_keeps_the_masks_of_the_first(folder: Path, model: wsss.Model) -> None:
    for number, name in enumerate(("one", "two", "three")):
        photo(Path(f"{name}/x.png"), number)
        assert command("predict", MODEL, name, "--out", "out") == 0
    for number in range(2):  # also when run again
        for name, output in (("one", "x"), ("two", "x.png"), ("three", "three/x.png")):
            assert np.array_equal(mask(Path(f"out/masks/{output}.png")), model.predict(f"{name}/x.png").mask)
            assert number or command("predict", MODEL, name, "--out", "out") == 0


def test_an_output_folder_among_the_photos_is_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(Path("photos/1.png"))
    for _ in range(2):
        assert command("predict", MODEL, "photos", "--out", "photos/masks", "--formats", "png,overlay") == 0
    assert "0 photos segmented, 1 up to date" in capsys.readouterr().out


def test_names_of_the_longest_that_a_file_system_allows(folder: Path) -> None:
    for end in "12":
        photo(Path(f"photos/{'ö' * 120}{end}.png"), int(end))
    assert command("predict", MODEL, "photos", "--out", "out", "--formats", "png,overlay,probabilities") == 0
    assert len(times("*.jpg")) == 2


def test_broken_photos_are_named_and_the_others_done(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        photo(Path(f"photos/{number}.png"), number)
    Path("photos/text.jpg").write_text("text")
    Path("photos/cut.png").write_bytes(Path("photos/0.png").read_bytes()[:-50])
    assert command("predict", MODEL, "photos", "--out", "out") == 1
    captured = capsys.readouterr()
    assert "3 photos segmented, 0 up to date, 2 broken" in captured.out
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in errors] == ["photos/cut.png", "photos/text.jpg"]
    assert len(times("*.png")) == 3
    photo(Path("photos/text.jpg"))
    photo(Path("photos/cut.png"))
    assert command("predict", MODEL, "photos", "--out", "out") == 0
    assert "2 photos segmented, 3 up to date" in capsys.readouterr().out


@pytest.mark.parametrize("message", ["CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory"])
def test_a_photo_that_needs_too_much_memory_is_named_and_the_others_done(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    """The errors of PyTorch, its CUDA libraries and the CPU."""
    for number, size in enumerate([(30, 40), (60, 50)]):
        Image.new("RGB", size[::-1]).save(Path(f"photo{number}.png"))
    predict = wsss.Model.predict

    def refuse(model: wsss.Model, rgb: NDArray[np.uint8], tags: None = None) -> wsss.Result:
        if rgb.shape[0] == 60:
            raise RuntimeError(message)
        return predict(model, rgb, tags)

    monkeypatch.setattr(wsss.Model, "predict", refuse)
    assert command("predict", MODEL, "photo0.png", "photo1.png", "--out", "out") == 1
    captured = capsys.readouterr()
    assert "photo1.png: 50x60 pixels need more memory than there is; use --megapixels" in captured.err
    assert len(times("*.png")) == 1
    monkeypatch.setattr(wsss.Model, "predict", lambda *_: [][0])
    with pytest.raises(IndexError):  # not a shortage
        command("predict", MODEL, "photo1.png", "--out", "out")


def test_predict_with_tags(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("10", "11", "12"):
        (folder / f"photos/{name}.jpg").parent.mkdir(exist_ok=True)
        (folder / f"photos/{name}.jpg").write_bytes(Path(f"data/JPEGImages/img_0{name}.jpg").read_bytes())
    Path("tags.csv").write_text("filename,tags\n10.jpg,bird\n11.jpg,\n")
    arguments = ("predict", MODEL, "photos", "--out", "out")
    assert command(*arguments, "--tags", "tags.csv") == 0
    assert set(np.unique(mask(Path("out/masks/10.png")))) <= {0, 3}
    assert set(np.unique(mask(Path("out/masks/11.png")))) == {0}
    assert set(np.unique(mask(Path("out/masks/12.png")))) > {0}
    Path("tags.csv").write_text("filename,tags\n10.jpg,cat\n11.jpg,\n")
    assert command(*arguments, "--tags", "tags.csv") == 0
    assert "1 photo segmented, 2 up to date" in capsys.readouterr().out
    Path("tags.csv").write_text("filename,tags\n10.jpg,kat\n")
    assert command(*arguments, "--tags", "tags.csv") == 1
    assert "did you mean cat?" in capsys.readouterr().err


def test_all_faults_of_a_command_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    code = command("predict", "no.safetensors", "no.jpg", "no", "empty", "--out", "out", "--formats", "png,gif")
    assert code == 1
    error = capsys.readouterr().err
    assert [line.split(": ")[1] for line in error.splitlines()] == [
        "--formats png,gif",
        "no.jpg",
        "no",
        "no.safetensors",
    ]
    assert not Path("out").exists()
    assert command("predict", MODEL, "empty", "--out", "out") == 1
    assert "empty: no photo found" in capsys.readouterr().err
    photo(Path("a.png"))
    Path("file").write_text("")
    assert command("predict", MODEL, "a.png", "--out", "file") == 1
    assert "error: file: cannot be written: " in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_half_file_and_continues(folder: Path, number: signal.Signals) -> None:
    for name in range(40):
        photo(Path(f"photos/{name:02}.png"), name, (400, 500))
    arguments = [sys.executable, "-m", "wsss", "predict", str(MODEL), "photos", "--out", "out"]
    arguments += ["--formats", "png,overlay", "--device", "cpu", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(Path("out/.wsss").glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in error
    done = {path.stem for path in Path("out/.wsss").glob("*.json")}
    assert 3 <= len(done) < 40
    assert not list(Path("out").rglob(".*.partial"))
    for path in (*Path("out/masks").iterdir(), *Path("out/overlays").iterdir()):
        assert mask(path).shape[:2] == (400, 500)
    before = times("*.png")
    assert command(*arguments[3:]) == 0
    assert len(times("*.png")) == 40
    assert all(times("*.png")[f"{name}.png"] == before[f"{name}.png"] for name in done)


def test_an_exif_rotated_photo_has_the_mask_of_the_upright_one(folder: Path) -> None:
    with Image.open("data/JPEGImages/img_011.jpg") as picture:
        upright = picture.convert("RGB")
    exif = Image.Exif()
    exif[0x112] = 6
    Path("photos").mkdir()
    upright.save("photos/upright.png")
    upright.rotate(90, expand=True).save("photos/turned.png", exif=exif)
    assert command("predict", MODEL, "photos", "--out", "out", "--formats", "png,coco,overlay") == 0
    assert np.array_equal(mask(Path("out/masks/turned.png")), mask(Path("out/masks/upright.png")))
    images = json.loads(Path("out/coco_rle.json").read_text())["images"]
    assert [(image["height"], image["width"]) for image in images] == [upright.size[::-1]] * 2
    assert np.array_equal(mask(Path("out/overlays/turned.jpg")), mask(Path("out/overlays/upright.jpg")))


def test_help_needs_no_torch() -> None:
    code = "from wsss.__main__ import main\ntry: main(['predict', '--help'])\nexcept SystemExit: pass\n"
    code += "import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
