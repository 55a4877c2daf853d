"""The trial of ``wsss new``, ``run``, ``predict`` and ``export`` on 200 photos as people have them.

From the root of a checkout, with VOC images of 320 pixels in ../shared/data/voc12_mini (docs/RESULTS.md describes the
trial and has its figures):

    python -m tests.manual.own_photos prepare            # photos, tags, and 50 others, in data/trial_photos
    python -m tests.manual.own_photos train              # wsss new, then wsss run, which is killed once and goes on
    python -m tests.manual.own_photos predict            # wsss predict on the others, with and without tags
    python -m tests.manual.own_photos score              # mIoU of all masks against VOC's
    python -m tests.manual.own_photos probabilities      # those in the files against those of the library
    PYTHON -m tests.manual.own_photos read               # where pycocotools, datumaro and label-studio-sdk are

The masks of VOC score the result. Nothing is chosen by them: the settings were chosen on the first 170 images of the
same order of images, which this trial leaves out.
"""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pipeline.data.voc import CLASSES

VOC = Path("../shared/data/voc12_mini")
WEIGHTS = "../shared/weights/tf_efficientnet_lite2_fp16.pth"
WORK = Path("data/trial_photos")
PHOTOS, OTHERS = WORK / "Fotos & Käfer", WORK / "others"
NAMES = list(CLASSES)
ANIMALS = ["bird", "cat", "cow", "dog", "horse", "sheep"]
FORMATS = "png,overlay,coco,cvat,labelstudio,csv,probabilities"


def voc(split: str) -> tuple[list[str], dict[str, list[str]]]:
    """The images of a split and the class names of each."""
    tags = json.loads((VOC / "tags.json").read_text())
    names = (VOC / "ImageSets/Segmentation" / f"{split}.txt").read_text().split()
    return names, {name: [NAMES[number - 1] for number in tags[name]] for name in names}


def prepare() -> None:
    """170 photos of animals and 30 negatives under odd names; 50 others, 40 of them with animals."""
    names, tags = voc("train")
    order = [name for name in names if set(tags[name]) & set(ANIMALS)]
    random.Random(5).shuffle(order)
    negatives = [name for name in names if not set(tags[name]) & set(ANIMALS)]
    random.Random(6).shuffle(negatives)
    chosen = order[170:340] + negatives[:30]
    shutil.rmtree(WORK, ignore_errors=True)
    PHOTOS.mkdir(parents=True)
    OTHERS.mkdir()
    source, rows = {}, [("Datei", "Schlagwort")]
    for number, name in enumerate(chosen):
        file = (f"Größe {number:03}.JPG", f"IMG_{number:04}.jpg", f"im Garten ({number}).jpeg")[number % 3]
        picture: Image.Image = Image.open(VOC / "JPEGImages" / f"{name}.jpg")
        if number == 7:  # stored on its side, and upright on the screen
            exif = Image.Exif()
            exif[274] = 6
            picture.rotate(90, expand=True).save(PHOTOS / file, quality=95, exif=exif)
        elif number == 11:
            picture.convert("CMYK").save(PHOTOS / file, quality=95)
        else:
            shutil.copyfile(VOC / "JPEGImages" / f"{name}.jpg", PHOTOS / file)
        source[file] = name
        if number < 190:  # ten negatives are not named at all
            rows += [(file, tag) for tag in tags[name]]
    with (WORK / "tags.csv").open("w", newline="", encoding="utf-8") as out:
        csv.writer(out, delimiter=";").writerows(rows)
    names, tags = voc("val")
    animals = [name for name in names if set(tags[name]) & set(ANIMALS)]
    rest = [name for name in names if not set(tags[name]) & set(ANIMALS)]
    known = {}
    for name in random.Random(7).sample(animals, 40) + random.Random(8).sample(rest, 10):
        shutil.copyfile(VOC / "JPEGImages" / f"{name}.jpg", OTHERS / f"{name}.jpg")
        source[f"{name}.jpg"] = name
        known[f"{name}.jpg"] = [tag for tag in tags[name] if tag in ANIMALS]
    (WORK / "others.json").write_text(json.dumps(known))
    (WORK / "source.json").write_text(json.dumps(source))


def wsss(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "wsss", *arguments]


def train() -> None:
    with (WORK / "tags.csv").open(newline="", encoding="utf-8") as file:
        rest = sorted({row[1] for row in csv.reader(file, delimiter=";")} - {"Schlagwort", *ANIMALS})
    named = ("--name", "trial", "--weights", WEIGHTS, "--negatives", "--force", "--leave-out", *rest)
    timed(wsss("new", str(PHOTOS), str(WORK / "tags.csv"), *named))
    start = time.monotonic()
    process = subprocess.Popen(wsss("run", "trial"), start_new_session=True)
    log, folder = Path("results/trial/logs/segmentations/cam_irn.log"), Path("results/trial/segmentations/cam_irn")
    while process.poll() is None:
        if any(folder.glob(".checkpoint-segmentation-*")):
            family = tree(process.pid)
            used = sum(map(processor_seconds, family))
            for one in family:
                os.kill(one, signal.SIGKILL)
            process.wait()
            print(f"killed after {time.monotonic() - start:.0f} s, {used:.0f} processor seconds", flush=True)
            break
        time.sleep(1)
    timed(wsss("run", "trial"))
    print(next(line for line in log.read_text().splitlines() if "resumes" in line))


def timed(command: list[str]) -> None:
    before, start = os.times(), time.monotonic()
    subprocess.run(command, check=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"{' '.join(command[3:5])}: {time.monotonic() - start:.0f} s, {used:.0f} processor seconds", flush=True)


def tree(pid: int) -> list[int]:
    """A process and all that it has started."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [pid, *(one for child in children for one in tree(int(child)))]


def processor_seconds(pid: int) -> float:
    """Of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def model() -> str:
    return "results/trial/predictions/cam_irn/model.safetensors"


def predict() -> None:
    for out, more in (("free", []), ("tagged", ["--tags", str(WORK / "others.json")])):
        timed(wsss("predict", model(), str(OTHERS), "--out", str(WORK / out), "--formats", FORMATS, *more))
    timed(wsss("export", "trial", "--formats", FORMATS))


def truth(name: str) -> np.ndarray:
    """VOC's mask in the classes of the trial, which are in alphabetical order."""
    table = np.zeros(256, np.uint8)
    table[255] = 255
    for number, animal in enumerate(ANIMALS, 1):
        table[NAMES.index(animal) + 1] = number
    return table[np.asarray(Image.open(VOC / "SegmentationClass" / f"{name}.png"))]


def score() -> None:
    source = json.loads((WORK / "source.json").read_text())
    held_out = Path("data/trial/evaluation.txt").read_text().splitlines()
    own = Path("results/trial/export/cam_irn/masks")
    for title, folder, files in (
        ("own photos, tags known", own, [file for file in source if (PHOTOS / file).exists()]),
        ("... trained on", own, [f for f in source if (PHOTOS / f).exists() and Path(f).stem not in held_out]),
        ("... held out", own, [f for f in source if Path(f).stem in held_out]),
        ("others, without tags", WORK / "free/masks", [file for file in source if (OTHERS / file).exists()]),
        ("others, with tags", WORK / "tagged/masks", [file for file in source if (OTHERS / file).exists()]),
    ):
        matrix = np.zeros((7, 7), np.int64)
        for file in files:
            real = truth(source[file])
            mask = np.asarray(Image.open(folder / f"{Path(file).stem}.png"))
            assert mask.shape == real.shape, (file, mask.shape, real.shape)
            valid = real != 255
            matrix += np.bincount(real[valid] * 7 + mask[valid], minlength=49).reshape(7, 7)
        iou = np.diag(matrix) / np.maximum(1, matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
        each = ", ".join(f"{name} {100 * value:.1f}" for name, value in zip(["background", *ANIMALS], iou, strict=True))
        accuracy = 100 * np.trace(matrix) / matrix.sum()
        print(f"{title}: {len(files)} photos, mIoU {100 * iou.mean():.1f}, accuracy {accuracy:.1f} ({each})")


def probabilities() -> None:
    """The files of each class, opened by Pillow, hold what ``Model.predict`` gives, for the others and their tags."""
    from wsss import load

    network = load(model())
    known = json.loads((WORK / "others.json").read_text())
    for folder, tags in ((WORK / "free", {}), (WORK / "tagged", known)):
        files, furthest = 0, 0
        for photo in sorted(OTHERS.iterdir()):
            result = network.predict(photo, tags.get(photo.name))
            for number, name in enumerate(ANIMALS, 1):
                expected = np.rint(result.probability(number) * 255)
                file = folder / "probabilities" / photo.stem / f"{number}_{name}.png"
                found = np.asarray(Image.open(file), int) if file.exists() else np.zeros(expected.shape, int)
                assert found.shape == result.mask.shape, file
                furthest = max(furthest, int(np.abs(found - expected).max()))
                files += file.exists()
        assert furthest <= 1, furthest  # of 255 levels; the number of threads may round otherwise
        print(f"{folder}: {files} files of probabilities differ by at most {furthest} levels from the library's")


def read() -> None:
    """Every format of the 50 others and of the 200 own photos gives back the masks, by the reader that people use."""
    for folder, photos in ((WORK / "free", OTHERS), (Path("results/trial/export/cam_irn"), PHOTOS)):
        masks = {path.stem: np.asarray(Image.open(path)) for path in sorted((folder / "masks").glob("*.png"))}
        for file in photos.iterdir():
            with Image.open(file) as picture:
                shown = ImageOps.exif_transpose(picture).size
            assert masks[file.stem].shape == shown[::-1], file
            with Image.open(folder / "overlays" / f"{file.stem}.jpg") as overlay:
                assert overlay.size == shown, file
        counts = [read_coco(folder, masks, name) for name in ("coco_rle.json", "coco_polygons.json")]
        counts += [read_cvat(folder, masks, photos), read_label_studio(folder, masks), read_table(folder, masks)]
        print(f"{folder}: {len(masks)} masks; objects by COCO RLE, polygons, CVAT, Label Studio, CSV: {counts}")


def read_coco(folder: Path, masks: dict[str, np.ndarray], name: str) -> int:
    from pycocotools.coco import COCO

    coco = COCO(folder / name)
    names = {image["id"]: Path(image["file_name"]).stem for image in coco.loadImgs(coco.getImgIds())}
    found = {stem: np.zeros_like(mask) for stem, mask in masks.items()}
    for annotation in coco.loadAnns(coco.getAnnIds()):
        found[names[annotation["image_id"]]][coco.annToMask(annotation) > 0] = annotation["category_id"]
    assert all(np.array_equal(found[stem], masks[stem]) for stem in masks)
    return len(coco.getAnnIds())


def read_cvat(folder: Path, masks: dict[str, np.ndarray], photos: Path) -> int:
    from datumaro.components.dataset import Dataset

    place = folder / "cvat"
    shutil.copytree(photos, place / "images", dirs_exist_ok=True)  # datumaro looks for them there
    shutil.copy(folder / "cvat.xml", place)
    dataset = Dataset.import_from(str(place), "cvat")
    count = 0
    labels = next(iter(dataset.categories().values())).items
    numbers = {name: number for number, name in enumerate(ANIMALS, 1)}
    for item in dataset:
        found = np.zeros_like(masks[Path(item.id).stem])
        for one in item.annotations:
            found[np.asarray(one.image, bool)] = numbers[labels[one.label].name]
            count += 1
        assert np.array_equal(found, masks[Path(item.id).stem]), item.id
    return count


def read_label_studio(folder: Path, masks: dict[str, np.ndarray]) -> int:
    from label_studio_sdk.converter.brush import decode_rle

    count = 0
    numbers = {name: number for number, name in enumerate(ANIMALS, 1)}
    tasks = json.loads((folder / "labelstudio.json").read_text())
    assert len(tasks) == len(masks)
    for task in tasks:
        regions = [region for prediction in task["predictions"] for region in prediction["result"]]
        stem = Path(task["data"]["image"].split("=")[-1]).stem
        mask = masks[next(one for one in masks if one in (stem, unquoted(stem)))]
        found = np.zeros_like(mask)
        for region in regions:
            height, width = region["original_height"], region["original_width"]
            pixels = decode_rle(region["value"]["rle"]).reshape(height, width, 4)[..., 3]
            found[pixels > 0] = numbers[region["value"]["brushlabels"][0]]
            count += 1
        assert np.array_equal(found, mask), stem
    return count


def unquoted(text: str) -> str:
    from urllib.parse import unquote

    return unquote(text)


def read_table(folder: Path, masks: dict[str, np.ndarray]) -> int:
    count = 0
    with (folder / "summary.csv").open(newline="", encoding="utf-8-sig") as file:
        for row in csv.DictReader(file):
            if row["class"] not in ("", "background"):
                number = ANIMALS.index(row["class"]) + 1
                assert int(row["pixels"]) == (masks[Path(row["photo"]).stem] == number).sum(), row
                count += 1
    return count


if __name__ == "__main__":
    {one.__name__: one for one in (prepare, train, predict, score, probabilities, read)}[sys.argv[1]]()
