"""Processor milliseconds that a loader process spends on an image, in the first epoch and in later ones.

    python -m benchmarks.loading [--images 200] [--epochs 3] [--jitter-on cpu|gpu] [CASE ...]

One loader process loads generated photos of VOC's sizes. Its processor time is read from the operating system after
each epoch: decoding, augmentation, collation and the hand-over to the main process. Later epochs read what the first
one has decoded. ``--jitter-on gpu`` leaves the colour jitter to the device, as in a training on CUDA. ``--cache 0``
decodes in each epoch.
"""

import argparse
import itertools
import os
import tempfile
from multiprocessing import active_children
from pathlib import Path

from benchmarks.photos import JITTER, Photos, photos
from pipeline.config.schema import Augmentation
from pipeline.data.loader import LoadingPlan, load

CASES = {  # augmentation, batch size, with label maps, with maps
    "257 square, jitter": (Augmentation(side="square", length=(257, 257), jitter=JITTER), 8, False, False),
    "OAA: short side 224, jitter": (Augmentation(side="short", length=(224, 224), jitter=JITTER), 1, False, False),
    "OAA+: the same with maps": (Augmentation(side="short", length=(224, 224), jitter=JITTER), 1, False, True),
    "DRS: 384 square, crop 320": (Augmentation(side="square", length=(384, 384), crop=320), 5, False, False),
    "DeepLab: scale 0.7-1.3, crop 321": (Augmentation(scale=(0.7, 1.3), crop=321), 10, True, False),
    "EDAM: long side 256-512, crop 368, jitter": (
        Augmentation(side="long", length=(256, 512), crop=368, jitter=JITTER),
        2,
        False,
        False,
    ),
    "IRN: scale 0.5-1.5, crop 512": (Augmentation(scale=(0.5, 1.5), crop=512), 16, True, False),
}
TICK = 1e3 / os.sysconf("SC_CLK_TCK")  # milliseconds


def used() -> float:
    """Processor milliseconds that the loader process has used."""
    (process,) = active_children()
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return TICK * (int(fields[11]) + int(fields[12]))


def milliseconds(source: Photos, case: str, epochs: int, gpu: bool, cache: float) -> list[float]:
    """Processor milliseconds an image in each epoch."""
    settings, size, labels, maps = CASES[case]
    dataset = source.dataset(settings, labels, maps)
    if cache > 0:
        dataset.keep(int(cache * 1e9))
    plan = LoadingPlan(1, 1, "loading", gpu)
    per_epoch = -(-len(dataset) // size)
    marks = []
    # Pinning would need a GPU; the main process does it.
    for number, _ in enumerate(load(dataset, size, range(epochs + 1), 0, plan)):
        if number % per_epoch == 0:
            marks.append(used())
    return [(after - before) / len(dataset) for before, after in itertools.pairwise(marks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--jitter-on", choices=["cpu", "gpu"], default="gpu")
    parser.add_argument("--cache", type=float, default=4.0, metavar="GB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = photos(Path(folder), options.images)
        print(f"{options.images} photos; processor ms an image of a loader process; jitter on the {options.jitter_on}")
        for case in options.cases:
            found = milliseconds(source, case, options.epochs, options.jitter_on == "gpu", options.cache)
            print(f"{case:<42} " + "  ".join(f"epoch {n} {value:6.2f}" for n, value in enumerate(found, 1)), flush=True)


if __name__ == "__main__":
    main()
