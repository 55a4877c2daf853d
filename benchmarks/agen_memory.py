"""An estimate of the memory of AGEN's training step: does it fit a graphics card?

    python -m benchmarks.agen_memory [--batch-size B ...] [--side S] [--precision fp32] [--card GB] ...

The defaults are the published setting (VGG-16 and ResNet-38, 321 pixels, batch 15, one card of 11 GB) and smaller
batches for gradient accumulation. Fake tensors without values pass through the network and its losses. The estimate is
the sum of the storages that autograd saves for the backward pass, each counted once, the weights, the gradients and the
momentum. It is a lower bound: a real step also needs workspace and the gradients of features. The CRF, which works on
41 x 41 cells, is not included.
"""

import argparse

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.config.registry import ONE_STEP, Choice
from pipeline.config.schema import Backbone, OneStep, Training
from pipeline.methods.agen import Agen
from pipeline.training.settings import autocast

CLASSES = 20
GB = 1e9


def settings_of(options: argparse.Namespace) -> OneStep:
    backbones = (Backbone(options.classification), Backbone(options.segmentation))
    own = {
        "shared": options.shared,
        "agm": options.agm,
        "coam": options.agm,
        "loss_size": options.loss_size,
        "boundary_weight": 0.0,
    }
    named = dict(zip(("classification", "segmentation"), backbones, strict=True))
    return OneStep(Choice(ONE_STEP, "agen", own), named, Training(1, 1e-3, epochs=35))


def saved_bytes(settings: OneStep, batch: int, side: int, precision: str) -> tuple[int, int]:
    """Bytes of the parameters, and of the other tensors that a batch's forward pass saves for the backward pass."""
    storages: dict[int, int] = {}
    alive: list[Tensor] = []  # keeps each storage's address unique

    def keep(x: Tensor) -> Tensor:
        alive.append(x)
        storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with FakeTensorMode():
        network = Agen(settings, CLASSES)
        images = torch.empty(batch, 3, side, side)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast(images.device, precision):
            sum(network.losses(images, torch.ones(batch, CLASSES), 0).values())
        own = {parameter.untyped_storage()._cdata: parameter.nbytes for parameter in network.parameters()}
    return sum(own.values()), sum(size for storage, size in storages.items() if storage not in own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classification", default="vgg16", metavar="BACKBONE")
    parser.add_argument("--segmentation", default="resnet38", metavar="BACKBONE")
    parser.add_argument("--shared", nargs=2, default=["conv2_2", "b2"], metavar="TAP")
    parser.add_argument("--agm", type=int, nargs="*", default=[3, 4, 5], metavar="STAGE")
    parser.add_argument("--loss-size", choices=["input", "output"], default="input")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[15, 5, 3, 1], metavar="B")
    parser.add_argument("--side", type=int, default=321)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--card", type=float, default=11.0, metavar="GB")
    options = parser.parse_args()
    settings = settings_of(options)
    names = f"{options.classification} and {options.segmentation}"
    for batch in options.batch_size:
        weights, activations = saved_bytes(settings, batch, options.side, options.precision)
        total = (3 * weights + activations) / GB  # weights, gradients, momentum
        fits = "more than" if total > options.card else "within"
        print(
            f"{names}, {options.side} px, {options.precision}, batch {batch}:"
            f" {activations / GB:.1f} GB saved for the backward pass, {3 * weights / GB:.1f} GB weights, gradients and"
            f" momentum: {total:.1f} GB, {fits} {options.card:g} GB"
        )


if __name__ == "__main__":
    main()
