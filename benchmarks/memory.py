"""Peak memory of the classifier stage's data structures at VOC's size and at ten times that size.

    python -m benchmarks.memory [N ...]

The dataset is N images of 500x375 with 1.47 tags of 20 classes on average (default 10,582 as in VOC's train_aug, and
105,820); all ids share one file. A separate process for each N loads the index, creates the accumulator and the
training set, trains a light network for one step, updates all maps, including the last maps that the attention drop
layer needs, dumps them and saves a checkpoint. Prints the process's peak resident set after each part.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from pipeline.data.index import write
from pipeline.stores.files import sha256

HEIGHT, WIDTH, CLASSES = 375, 500, 20


def write_index(folder: Path, images: int) -> Path:
    """Write an index of ``images`` ids that share one file; return its path."""
    picture = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    cv2.imwrite(str(folder / "image.jpg"), picture)
    digest = sha256(folder / "image.jpg")
    random = np.random.default_rng(0)
    names = [f"image_{number:07d}" for number in range(images)]
    entries = {}
    for name in names:
        tags = random.choice(CLASSES, 1 + int(random.random() < 0.47), replace=False) + 1
        entries[name] = {
            "file": "image.jpg",
            "height": HEIGHT,
            "width": WIDTH,
            "tags": sorted(tags.tolist()),
            "mask": None,
            "saliency": None,
            "sha256": digest,
        }
    index = {
        "root": str(folder),
        "classes": [f"class {number}" for number in range(CLASSES)],
        "splits": {"train": names, "evaluation": []},
        "tag_source": "random",
        "images": entries,
    }
    path = folder / "index.json"
    write(path, index)
    return path


def megabytes() -> float:
    """This process's peak resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(path: Path) -> dict[str, float]:
    """Peak MB after each part of the stage's work, and the seconds of dump and checkpoint."""
    import torch

    from pipeline.config.schema import Accumulate, Augmentation, Backbone, Classifier, Head, Training
    from pipeline.data.index import Index
    from pipeline.data.loader import load
    from pipeline.data.loading import TrainingSet
    from pipeline.methods.oaa import AttentionAccumulator
    from pipeline.training import checkpoint, models

    figures = {"imports": megabytes()}
    index = Index(path)
    images = index.images("train")
    figures["index"] = megabytes()
    accumulator = AttentionAccumulator(images, Accumulate(gate="none", skip_epochs=0), 1, keep_last=True)
    dataset = TrainingSet(images, CLASSES, Augmentation(side="short", length=(224, 224), flip=True), 0)
    figures["accumulator"] = megabytes()
    method = models.build(Classifier(Backbone("small"), Training(1, 0.1), head=Head(0)), CLASSES)
    batch = next(load(dataset, 1, [0])).to(torch.device("cpu"))
    output = method(batch.images)
    method.loss(output, batch.tags).backward()  # type: ignore[no-untyped-call]
    figures["step"] = megabytes()
    raw = torch.rand(1, CLASSES, *output.maps.shape[2:])
    for image, tags in zip(images, dataset.tags, strict=True):
        accumulator.update(raw, raw.mean((2, 3)), tags[None], [image.id], batch.windows, 0)
    start = time.perf_counter()
    accumulator.dump(path.with_name("maps.h5"))
    figures["dump"] = megabytes()
    figures["dump seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    checkpoint.save(path.with_name("checkpoint"), {"network": method.state_dict(), "task": accumulator.state()})
    figures["checkpoint"] = megabytes()
    figures["checkpoint seconds"] = time.perf_counter() - start
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=int, default=[10_582, 105_820])
    parser.add_argument("--index", type=Path, help=argparse.SUPPRESS)  # the process that is measured
    options = parser.parse_args()
    if options.index:
        print(json.dumps(measure(options.index)))
        return
    parts = ("imports", "index", "accumulator", "step", "dump", "checkpoint")
    print(
        f"{'images':>11}" + "".join(f"{part:>12}" for part in parts) + "   peak MB so far; seconds of dump, checkpoint"
    )
    for count in options.images:
        with tempfile.TemporaryDirectory() as folder:
            path = write_index(Path(folder), count)
            command = [sys.executable, "-m", "benchmarks.memory", "--index", str(path)]
            text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        figures = json.loads(text)
        line = "".join(f"{figures[part]:12.0f}" for part in parts)
        print(f"{count:>11}{line}   {figures['dump seconds']:.1f}, {figures['checkpoint seconds']:.1f}", flush=True)


if __name__ == "__main__":
    main()
