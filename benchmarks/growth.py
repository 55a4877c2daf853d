"""How time and memory grow with the number of images: the index, a plan, DVC, an accumulator and a label store.

The images are simulated: one photo with many names, as hard links, and random tags. Each measurement runs in a process
of its own, whose peak of resident memory includes Python, NumPy and torch. Run:

    python -m benchmarks.growth [--images 1000 10000 100000 1000000] [--only index plan ...]

A step that reads every image (the index stage's checks, the CRF) is linear by nature and is not measured here.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HEIGHT, WIDTH, CLASSES, CELLS = 375, 500, 20, 28
ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--only", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--links", type=int, default=100_000, help="largest number of images to create hard links for")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        start, values = time.perf_counter(), STEPS[options.step](Path.cwd())
        values |= {"seconds": values.get("seconds", round(time.perf_counter() - start, 2))}
        values = memory() | values  # that of a step itself was measured while it held its data
        print(json.dumps(values))
        return
    for images in options.images:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            create(Path(folder), images, links=images <= options.links)
            for step in options.only:
                if step in LINKED and images > options.links:
                    continue
                command = [sys.executable, "-m", "benchmarks.growth", "--step", step]
                environment = {**os.environ, "PYTHONPATH": str(ROOT)}
                done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
                shown = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()[-300:]]
                print(f"{images:>9,} images, {step}: {shown[0]}", flush=True)


def memory() -> dict[str, int]:
    """The MB of this process: its peak, and what it holds besides mapped files. (getrusage knows the parent's peak.)"""
    status = dict(re.findall(r"(VmHWM|RssAnon):\s+(\d+) kB", Path("/proc/self/status").read_text()))
    return {"peak MB": int(status["VmHWM"]) // 1024, "held MB": int(status["RssAnon"]) // 1024}


def create(folder: Path, images: int, links: bool) -> None:
    """Write an index and, with ``links``, the photos, lists and tags that it describes."""
    import cv2

    from pipeline.data.index import write
    from pipeline.data.parts import parts
    from pipeline.stores.files import sha256

    random = np.random.default_rng(0)
    photos = folder / "data" / "JPEGImages"
    photos.mkdir(parents=True)
    first = folder / "data" / "photo.jpg"
    cv2.imwrite(str(first), np.full((HEIGHT, WIDTH, 3), 128, np.uint8))
    digest = sha256(first)
    names = [f"image_{number:07d}" for number in range(images)]
    tags = [sorted((random.permutation(CLASSES)[: 1 + int(random.random() < 0.47)] + 1).tolist()) for _ in names]
    fixed = {"height": HEIGHT, "width": WIDTH, "mask": None, "saliency": None, "sha256": digest}
    entries = {
        name: {"file": f"JPEGImages/{name}.jpg", "tags": own, **fixed} for name, own in zip(names, tags, strict=True)
    }
    classes = [f"class {number}" for number in range(CLASSES)]
    held_out = max(1, images // 10)
    splits = {"train": names[held_out:], "evaluation": names[:held_out]}
    raw = {"root": "data", "classes": classes, "splits": splits, "tag_source": "random", "images": entries}
    for name, part in parts(raw):
        write(folder / f"{name}.json", part)
    if links:
        source = first
        for number, name in enumerate(names):
            if number % 60_000 == 59_999:  # a file of ext4 has at most 65,000 links
                source = photos / f"{name}.jpg"
                shutil.copy(first, source)
            else:
                os.link(source, photos / f"{name}.jpg")
        for split, ids in splits.items():
            (folder / "data" / f"{split}.txt").write_text("\n".join(ids) + "\n")
        (folder / "data" / "classes.txt").write_text("\n".join(classes) + "\n")
        (folder / "data" / "tags.json").write_text(
            json.dumps({name: [classes[tag - 1] for tag in own] for name, own in zip(names, tags, strict=True)})
        )
    for name in ("Snakefile", "params.yaml", "dvc.yaml", "profiles", "pipeline", "stages", "environment.yml"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "growth.yaml").write_text(
        "experiment: growth\nrows: [oaa]\nmethod: oaa\nfirst: []\n"
        "dataset: {root: data, classes: classes.txt, masks: null, train: train.txt, evaluation: evaluation.txt,\n"
        "  demo: null}\n"
        "saliency: {kind: fine_grained, path: null}\n"
    )


def load_index(folder: Path) -> dict[str, Any]:
    """Load the index, then read each image once, one at a time, as a stage does."""
    from pipeline.data.index import Index

    start = time.perf_counter()
    index = Index(folder / "index.json")
    loaded = time.perf_counter() - start
    pixels = sum(image.height * image.width for image in index.images())
    size = (folder / "index.json").stat().st_size
    return {"bytes per image": round(size / len(index)), "load": round(loaded, 2), "pixels": pixels} | memory()


def accumulate(folder: Path) -> dict[str, Any]:
    """Set up the accumulator and update 2,000 images; the time of an epoch follows from it."""
    import torch

    from pipeline.config.schema import Accumulate
    from pipeline.data.geometry import Window
    from pipeline.data.index import Index
    from pipeline.methods.oaa import AttentionAccumulator

    index = Index(folder / "train.json")
    images = index.images("train")
    start = time.perf_counter()
    accumulator = AttentionAccumulator(images, Accumulate(skip_epochs=0, cells=CELLS), 1)
    ready = time.perf_counter() - start
    torch.manual_seed(0)
    count = min(len(images), 2_000) // 16 * 16
    start = time.perf_counter()
    for first in range(0, count, 16):
        batch = images[first : first + 16]
        tags = torch.zeros(16, CLASSES)
        for row, image in enumerate(batch):
            tags[row, [tag - 1 for tag in image.tags]] = 1
        windows = [Window() for _ in batch]
        maps, logits = torch.rand(16, CLASSES, 41, 41), torch.randn(16, CLASSES)
        accumulator.update(maps, logits, tags, [image.id for image in batch], windows, 0)
    update = (time.perf_counter() - start) / max(1, count)
    return {"set up": round(ready, 2), "ms an image": round(1000 * update, 2)} | memory()


def labels(folder: Path) -> dict[str, Any]:
    """Write a label store block by block and read it back, as the label stages do, with labels of 32 x 32 pixels."""
    from pipeline.data.index import Index
    from pipeline.stores.blocks import require, write_blocks
    from pipeline.stores.raster import RasterStore, RasterWriter

    images = Index(folder / "index.json").images("train")
    label = np.zeros((32, 32), np.uint8)
    start = time.perf_counter()
    with RasterWriter(folder / "labels.h5", "labels") as writer:
        write_blocks(images, lambda part: ((image.id, 0, label) for image in part), writer, folder / "parts")
    written = time.perf_counter() - start
    store = RasterStore(folder / "labels.h5")
    require(store, images)
    return {"write": round(written, 2), "store": round(time.perf_counter() - start - written, 2)} | memory()


def _timed(*command: str) -> dict[str, Any]:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = round(time.perf_counter() - start, 2)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    return {"seconds": seconds, "child MB": peak, "status": done.returncode}


def plan(folder: Path) -> dict[str, Any]:
    """``snakemake -n`` with the contents of all images known from the run before, and the first of all."""
    (folder / "results").mkdir(exist_ok=True)
    command = ("snakemake", "-n", "--quiet", "--cores", "1", "--configfile", "params.yaml", "growth.yaml")
    first = _timed(*command)
    time.sleep(4)  # files that are seconds old are read again
    return {"first": first, "second": _timed(*command)}


def dvc(folder: Path) -> dict[str, Any]:
    """``dvc status`` of the index stage, with the images as its dependency, first and again."""
    files = "[data/JPEGImages, data/train.txt, data/tags.json]"
    (folder / "dvc.yaml").unlink()
    (folder / "dvc.yaml").write_text(f"stages:\n  index:\n    cmd: 'true'\n    deps: {files}\n")
    subprocess.run(["dvc", "init", "--no-scm", "--quiet"])
    subprocess.run(["dvc", "commit", "--force", "--quiet"])
    return {"status": _timed("dvc", "status"), "again": _timed("dvc", "status")}


STEPS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "index": load_index,
    "accumulator": accumulate,
    "labels": labels,
    "plan": plan,
    "dvc": dvc,
}
LINKED = ("plan", "dvc")

if __name__ == "__main__":
    main()
