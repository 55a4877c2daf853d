"""Localization and prediction of whole images: milliseconds an image, and the share of the network's forward passes.

    python -m benchmarks.inference [--device cpu] [--backbone NAME] [--images N] [--unpadded] [--json FILE] [CASE ...]

The photos have 48 sizes similar to those of VOC. On a CPU the figures are processor time. On CUDA they are wall time,
from the first batch on: convolutions see few shapes (``pipeline.inference.shapes``), or each image's own with
``--unpadded``. Compare the two in processes of their own, since cuDNN keeps its plans as long as the process lives. The
photos are noisy, so that the CRF takes several times as long as on real ones.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.loop import block_of
from benchmarks.photos import CLASSES, photos
from pipeline.config.registry import SEGMENTATIONS, Choice
from pipeline.config.schema import Augmentation, Backbone, Crf, Localization, Segmentation, Test, Training
from pipeline.data.index import Image
from pipeline.inference.batching import batches, pixels_per_batch
from pipeline.inference.folding import placed
from pipeline.inference.localize import localization_maps
from pipeline.inference.segment import segmentations
from pipeline.inference.shapes import FewShapes
from pipeline.training import models
from pipeline.training.settings import describe, prepare, uses_bf16

SIZES = [(375 - number, 500) if number % 2 else (500, 333 + number) for number in range(48)]  # height, width
SCALES = (1.0, 1.5)
VIEWS: dict[str, Any] = {"scales": SCALES, "flip": True}
TESTS = {
    "prediction, one view": Test(flip=False),
    "prediction, four views": Test(**VIEWS),
    "prediction, four views, CRF": Test(**VIEWS, crf=Crf()),
}
MAPS = {
    "maps, four views of 257 x 257": Localization("classifiers/x", side="square", length=257, **VIEWS),
    "maps, four views, short side 257": Localization("classifiers/x", side="short", length=257, **VIEWS),
}
TRAINING = Training(8, 1e-3)


class Counted(nn.Module):
    """A network that measures its forward passes."""

    def __init__(self, network: nn.Module, clock: Callable[[], float]) -> None:
        super().__init__()
        self.network, self.clock, self.seconds = network, clock, 0.0

    def _timed(self, function: Callable[..., Any], images: torch.Tensor) -> Any:
        start = self.clock()
        result = function(images)
        self.seconds += self.clock() - start
        return result

    def forward(self, images: torch.Tensor) -> Any:
        return self._timed(self.network, images)

    def localize(self, images: torch.Tensor) -> Any:
        return self._timed(self.network.localize, images)  # type: ignore[arg-type]


def built(case: str, backbone: str, device: torch.device) -> nn.Module:
    """The network of a case with random weights, as the stages prepare it."""
    torch.manual_seed(0)
    if case in MAPS:
        network: nn.Module = models.build(block_of(backbone, TRAINING, Augmentation()), CLASSES)
    else:
        head = Choice(SEGMENTATIONS, "deeplab_largefov", {"channels": 256, "rate": 6})
        network = models.build(Segmentation("ground_truth", head, Backbone(backbone, 16), TRAINING), CLASSES)
        confident = torch.full((CLASSES + 1,), -10.0)
        confident[:3] = torch.tensor([3.0, 2.5, 2.0])  # the CRF sees three classes, as with a trained network
        network.head.fc8.bias.data = confident  # type: ignore[union-attr]
    return placed(network.eval(), device, "auto")


def measure(
    case: str, network: nn.Module, images: Sequence[Image], device: torch.device, pads: bool
) -> tuple[float, float]:
    """Seconds of all images, and seconds of the network's forward passes among them."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    counted: Any = Counted(network, clock)
    start = clock()
    with FewShapes() if pads else nullcontext():
        rows: Iterable[Any]
        if case in MAPS:
            rows = localization_maps(counted, images, MAPS[case], device)
        else:
            rows = segmentations(counted, images, TESTS[case], device, map)
        for _ in rows:
            pass
    return clock() - start, counted.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=[*TESTS, *MAPS], metavar="CASE", help="; ".join([*TESTS, *MAPS]))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--images", type=int, default=len(SIZES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--unpadded", action="store_true", help="on CUDA, do not pad the inputs of convolutions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write images/s by case")
    options = parser.parse_args()
    device = prepare(options.device, options.threads)
    print(f"{options.images} photos, {options.backbone}, {describe(device, uses_bf16(device, 'auto'))}")
    with tempfile.TemporaryDirectory() as folder:
        images = photos(Path(folder), options.images, SIZES).images
        reading = time.process_time()
        for _ in batches(images, lambda image: image.size, pixels_per_batch(device)):
            pass
        reading = time.process_time() - reading
        print(f"reading and normalising alone: {1e3 * reading / len(images):.1f} ms of processor time an image")
        rates = {}
        for case in options.cases:
            pads = device.type == "cuda" and not options.unpadded and "257 x 257" not in case
            whole, passes = measure(case, built(case, options.backbone, device), images, device, pads)
            print(
                f"{case:<36} {1e3 * whole / len(images):8.1f} ms an image, {len(images) / whole:7.1f} images/s, "
                f"forward passes {passes / whole:6.1%}",
                flush=True,
            )
            rates[case] = len(images) / whole
    if options.json is not None:
        options.json.write_text(json.dumps(rates))


if __name__ == "__main__":
    main()
