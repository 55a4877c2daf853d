"""The dense CRF over background and an image's own classes, against the CRF over all 21: seconds and changed labels.

    python -m benchmarks.crf [DATA] [--images N] [--iterations N]

DATA contains JPEGImages and SegmentationClass of PASCAL VOC at native size. The scores are masks, blurred to the
resolution of a localization map. Each CRF runs once, without warm-up.
"""

import argparse
import statistics
import time
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.schema import Crf
from pipeline.labels.base import IGNORE, as_probabilities
from pipeline.labels.crf import dense_crf

CLASSES = 21  # background included
BLUR = 0.04  # sigma over the short side


def scores_of(mask: NDArray[np.uint8]) -> NDArray[np.float32]:
    """21 x H x W scores: each class blurred to a maximum of 1, the background 1 - max, absent classes 0."""
    scores = np.zeros((CLASSES, *mask.shape), np.float32)
    for class_id in np.unique(mask[(mask > 0) & (mask != IGNORE)]):
        blurred = cv2.GaussianBlur((mask == class_id).astype(np.float32), (0, 0), BLUR * min(mask.shape))
        scores[class_id] = blurred / blurred.max()
    scores[0] = 1 - scores.max(axis=0)
    return scores


def timed(image: NDArray[np.uint8], scores: NDArray[np.float32], settings: Crf) -> tuple[float, NDArray[np.intp]]:
    """Seconds of the CRF, and the channel with the highest marginal at each pixel, H x W."""
    start = time.perf_counter()
    winners = dense_crf(image, as_probabilities(scores), settings).argmax(axis=0)
    return time.perf_counter() - start, winners


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, default=Path("../shared/data/voc12_fullsize_48"))
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=10)
    options = parser.parse_args()
    settings = Crf(iterations=options.iterations)
    few: list[float] = []
    many: list[float] = []
    changed = pixels = 0
    print("image        size     classes  present s  all 21 s  ratio  labels changed")
    for path in sorted((options.data / "SegmentationClass").glob("*.png"))[: options.images]:
        photo = cv2.imread(str(options.data / f"JPEGImages/{path.stem}.jpg"))
        if photo is None:
            parser.error(f"{path.stem}.jpg does not decode")
        image = np.asarray(cv2.cvtColor(photo, cv2.COLOR_BGR2RGB), np.uint8)
        scores = scores_of(np.asarray(Image.open(path)))
        present = np.flatnonzero(scores.reshape(CLASSES, -1).any(axis=1))
        short, by_present = timed(image, scores[present], settings)
        long, by_all = timed(image, scores, settings)
        differ = int((present[by_present] != by_all).sum())
        few.append(short)
        many.append(long)
        changed, pixels = changed + differ, pixels + by_all.size
        size = f"{image.shape[1]}x{image.shape[0]}"
        print(f"{path.stem}  {size}  {len(present):7}  {short:9.2f}  {long:8.2f}  {long / short:5.1f}  {differ}")
    if not few:
        parser.error(f"{options.data}/SegmentationClass holds no PNG")
    one, other = statistics.median(few), statistics.median(many)
    print(
        f"median: {one:.2f} s against {other:.2f} s, a ratio of {other / one:.1f}; {changed} of {pixels} labels changed"
    )


if __name__ == "__main__":
    main()
