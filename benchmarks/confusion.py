"""Time of the confusion matrix of 500x375 label maps with 21 classes, against torchmetrics.

    python -m benchmarks.confusion [--images N]

Prints the median milliseconds an image over N images, with one CPU thread and the same label maps. The conversion to
tensors is not counted.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.evaluation import confusion
from pipeline.evaluation.confusion import IGNORE, ConfusionMatrix
from pipeline.networks.vision import import_torchvision

CLASSES = 21  # background included
HEIGHT, WIDTH = 375, 500
Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def label_maps(images: int) -> list[Pair]:
    """Masks of 25 x 25 blocks, ignored at top and bottom, and predictions that agree in two pixels of three."""
    random = np.random.default_rng(0)
    pairs = []
    for _ in range(images):
        blocks = random.integers(0, CLASSES, (HEIGHT // 25, WIDTH // 25), dtype=np.uint8)
        mask = blocks.repeat(25, axis=0).repeat(25, axis=1)
        noise = random.integers(0, CLASSES, mask.shape, dtype=np.uint8)
        guess = np.where(random.random(mask.shape) < 2 / 3, mask, noise)
        mask[:5] = mask[-5:] = IGNORE
        pairs.append((mask, guess))
    return pairs


def timed(update: Callable[[Any, Any], None], pairs: list[Any]) -> float:
    """Median milliseconds of one update."""
    seconds = []
    for mask, guess in pairs:
        start = time.perf_counter()
        update(mask, guess)
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=40)
    torch.set_num_threads(1)  # both use one; on a busy machine several threads wait for each other
    pairs = label_maps(parser.parse_args().images)

    import_torchvision()  # torchmetrics imports torchvision, some builds of which load only in this way
    from torchmetrics.classification import MulticlassJaccardIndex
    from torchmetrics.segmentation import MeanIoU

    ours = ConfusionMatrix(CLASSES - 1)
    jaccard = MulticlassJaccardIndex(CLASSES, ignore_index=IGNORE)
    one_hot = MeanIoU(CLASSES, input_format="index")
    tensors = [tuple(torch.from_numpy(side).long() for side in pair) for pair in pairs]
    # MeanIoU cannot ignore pixels, so it receives only the rows without ignored ones.
    framed = [tuple(side[None, 5:-5] for side in pair) for pair in tensors]

    figures = {
        "pipeline.evaluation": timed(ours.update, pairs),
        "torchmetrics MulticlassJaccardIndex": timed(lambda mask, guess: jaccard.update(guess, mask), tensors),
        "torchmetrics MeanIoU": timed(lambda mask, guess: one_hot.update(guess, mask), framed),
    }
    miou = float(confusion.mean(confusion.iou(ours.matrix())))
    assert abs(miou - float(jaccard.compute())) < 1e-6, "the two matrices differ"
    base = figures["pipeline.evaluation"]
    print(f"{len(pairs)} images, {HEIGHT}x{WIDTH}, {CLASSES} classes, one thread, mIoU {miou:.4f} on both")
    for name, milliseconds in figures.items():
        print(f"{name:<36} {milliseconds:8.3f} ms an image {milliseconds / base:6.1f} x")


if __name__ == "__main__":
    main()
