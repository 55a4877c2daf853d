"""The losses of AGEN: online labels from class-aware maps, balanced seeding loss, boundary loss.

Where the paper leaves a choice open, the docstrings state which one this implementation makes.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.config.schema import Crf
from pipeline.data.loading import IGNORE, MEAN, STD
from pipeline.labels.crf import dense_crf
from pipeline.methods.one_step import Mapper
from pipeline.training.distributed import ratio

Size = tuple[int, int]
FLOOR = 1e-4  # smallest probability in the boundary loss (SEC)


def online_labels(
    maps: Tensor, tags: Tensor, size: Size, delta: float, power: float = 8.0, confident: str = "value"
) -> Tensor:
    """Derive pixel labels from class-aware maps (AGEN Eq. 2 to 4): B x H x W class ids, 255 where uncertain.

    The maps of the image's tags pass a ReLU, are upsampled bilinearly and divided by their maximum. The background
    score is (1 - strongest class)^power. A pixel is labelled if exactly one score is confident. It is 255 if none is,
    or if several are (a conflict). No gradient flows through the labels.

    A tagged class may have no positive value, for example early in training from scratch. Its map cannot be normalised
    (Eq. 3) and its location is unknown, so the image gets no background labels. An image without tags is all
    background.

    Args:
        maps: B x K x h x w, raw.
        tags: B x K, 0 or 1.
        size: H and W of the labels.
        delta: the confidence threshold.
        power: exponent of the background score.
        confident: 'value': scores above delta; 'share': at least (1 - delta) of the score's maximum in the image;
            'rank': the delta * H * W pixels with the highest scores (including ties, excluding scores of 0).
    """
    upsampled = functional.interpolate(maps.detach().float().relu(), size=size, mode="bilinear", align_corners=False)
    upsampled = upsampled * tags[:, :, None, None]
    peaks = upsampled.amax((2, 3), keepdim=True)
    foreground = upsampled / peaks.masked_fill(peaks == 0, 1)
    background = (1 - foreground.amax(1, keepdim=True)) ** power
    is_confident = _confident(torch.cat([background, foreground], 1), delta, confident)
    unlocated = ((peaks[:, :, 0, 0] == 0) & (tags > 0)).any(1)
    is_confident[:, 0] &= ~unlocated[:, None, None]
    marks = is_confident.to(torch.uint8)
    ids = torch.arange(marks.shape[1], dtype=torch.uint8, device=maps.device)[:, None, None]
    labels = (marks * ids).amax(1)  # on bytes, much faster than argmax
    return labels.masked_fill(marks.sum(1, dtype=torch.uint8) != 1, IGNORE).long()


def _confident(scores: Tensor, delta: float, confident: str) -> Tensor:
    """Which of the B x C x H x W scores are confident, as a bool tensor of the same shape."""
    if confident == "value":
        return scores > delta
    if confident == "share":
        least = (1 - delta) * scores.amax((2, 3), keepdim=True)
    else:
        pixels = scores.flatten(2)
        last = max(1, round(delta * pixels.shape[2])) - 1
        least = pixels.sort(2, descending=True).values[:, :, last, None, None]
    return (scores >= least) & (scores > 0)


def inside(images: Tensor, size: Size) -> Tensor:
    """B x H x W bool at ``size``: false in the padding of normalised images, where all channels are exactly 0."""
    content = (images != 0).any(1, keepdim=True).float()
    return functional.interpolate(content, size=size, mode="nearest-exact")[:, 0] > 0


def seeding_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The balanced seeding loss (AGEN Eq. 12): mean -log S over object pixels plus that over background pixels.

    Both means are taken over all labelled pixels of the batch, so images with more labels weigh more. A mean over no
    pixels is 0.

    Args:
        logits: B x (K + 1) x H x W, background first.
        labels: B x H x W class ids; 255 is ignored.
    """
    # N x C logits, because the CUDA kernel for B x C x H x W logits is not deterministic.
    pixels, classes = logits.float().movedim(1, -1).flatten(0, -2), labels.flatten()
    losses = functional.cross_entropy(pixels, classes, ignore_index=IGNORE, reduction="none")
    total = torch.zeros((), device=logits.device)
    for chosen in ((classes != 0) & (classes != IGNORE), classes == 0):
        total = total + ratio((losses * chosen).sum(), chosen.sum())
    return total


class BoundaryLoss:
    """The boundary loss (AGEN Eq. 14), SEC's constrain-to-boundary: mean over pixels of KL(R || S).

    S is the softmax at a reduced size. R holds the dense CRF's marginals for S and the image, over all K + 1 classes.
    No gradient flows through R. Probabilities of S and R are at least about 1e-4, so that logarithms stay bounded.

    The CRF runs on the CPU and is slow. The constructor therefore starts it, in worker processes if ``mapper`` has
    some, and ``value`` waits for the result. Work between the two calls runs in parallel with the CRF.
    """

    def __init__(self, logits: Tensor, images: Tensor, grid: int, crf: Crf, mapper: Mapper) -> None:
        """
        Args:
            logits: B x (K + 1) x h x w.
            images: B x 3 x H x W, normalised.
            grid: cells on the long side of the reduced size.
            crf: parameters of the dense CRF.
            mapper: ``map``, or an equivalent over worker processes that starts immediately.
        """
        height, width = logits.shape[2:]
        factor = grid / max(height, width)
        size = max(1, round(height * factor)), max(1, round(width * factor))
        logits = functional.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
        self.probabilities = (logits.softmax(1) + FLOOR) / (1 + FLOOR * logits.shape[1])
        unaries = self.probabilities.detach().cpu().numpy()
        self.marginals = mapper(dense_crf, photos(images, size), unaries, [crf] * len(unaries))

    def value(self) -> Tensor:
        """The scalar loss; waits for the CRF."""
        refined = torch.from_numpy(np.stack(list(self.marginals))).to(self.probabilities.device).clamp_min(FLOOR)
        refined = refined / refined.sum(1, keepdim=True)
        return (refined * (refined.log() - self.probabilities.log())).sum(1).mean()


def photos(images: Tensor, size: Size) -> NDArray[Any]:
    """Undo the normalisation of B x 3 x H x W images and area-average them to B x h x w x 3 uint8 at ``size``."""
    reduced = functional.interpolate(images.detach().float(), size=size, mode="area").cpu().movedim(1, -1).numpy()
    return np.ascontiguousarray(np.rint((reduced * STD + MEAN) * 255).clip(0, 255).astype(np.uint8))
