"""The losses of AGEN: labels read from class-aware maps on the fly, balanced seeding loss, boundary loss.

Where the paper leaves a choice open, the docstrings say which one was taken.
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

Size = tuple[int, int]
FLOOR = 1e-4  # of a probability in the boundary loss (SEC)


def online_labels(
    maps: Tensor, tags: Tensor, size: Size, delta: float, power: float = 8.0, confident: str = "value"
) -> Tensor:
    """The pixel labels that class-aware maps give (AGEN Eq. 2 to 4): B x H x W class ids, 255 where nothing is sure.

    The maps of the image's tags pass a ReLU, are upsampled (bilinear) and divided by their maximum; the background's
    score is (1 - strongest class)^power. A pixel is labelled where exactly one score is confident: none and several
    (conflicts) are 255. No gradient flows through the labels.

    A tagged class without a positive value, as networks have that train from scratch, cannot be divided by its maximum
    (Eq. 3) and covers pixels that nobody knows: the image then has no background. One without tags is all background.

    Args:
        maps: B x K x h x w, raw.
        tags: B x K, 0 or 1.
        size: H and W of the labels.
        delta: the threshold.
        confident: 'value': scores above delta; 'share': at least (1 - delta) of the score's maximum in the image;
            'rank': the delta * H * W pixels of the highest scores (all of the last one's equals, none of score 0).
    """
    found = functional.interpolate(maps.detach().float().relu(), size=size, mode="bilinear", align_corners=False)
    found = found * tags[:, :, None, None]
    peaks = found.amax((2, 3), keepdim=True)
    foreground = found / peaks.masked_fill(peaks == 0, 1)
    background = (1 - foreground.amax(1, keepdim=True)) ** power
    sure = _confident(torch.cat([background, foreground], 1), delta, confident)
    unknown = ((peaks[:, :, 0, 0] == 0) & (tags > 0)).any(1)
    sure[:, 0] &= ~unknown[:, None, None]
    marks = sure.to(torch.uint8)
    ids = torch.arange(marks.shape[1], dtype=torch.uint8, device=maps.device)[:, None, None]
    labels = (marks * ids).amax(1)  # of bytes far faster than argmax
    return labels.masked_fill(marks.sum(1, dtype=torch.uint8) != 1, IGNORE).long()


def _confident(scores: Tensor, delta: float, confident: str) -> Tensor:
    """Which of B x C x H x W scores label their pixels."""
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
    """B x H x W at ``size``: where normalised images are no padding, of which every channel is exactly 0."""
    seen = (images != 0).any(1, keepdim=True).float()
    return functional.interpolate(seen, size=size, mode="nearest-exact")[:, 0] > 0


def seeding_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The balanced seeding loss (AGEN Eq. 12): mean -log S over labelled objects plus that over labelled background.

    Both means are taken over the batch, so that an image counts by its labels; the mean of no pixel is 0.

    Args:
        logits: B x (K + 1) x H x W, background first.
        labels: B x H x W class ids; 255 is ignored.
    """
    # As rows, since the kernel for images is not deterministic on CUDA.
    rows, classes = logits.float().movedim(1, -1).flatten(0, -2), labels.flatten()
    each = functional.cross_entropy(rows, classes, ignore_index=IGNORE, reduction="none")
    total = torch.zeros((), device=logits.device)
    for chosen in ((classes != 0) & (classes != IGNORE), classes == 0):
        total = total + (each * chosen).sum() / chosen.sum().clamp_min(1)
    return total


class BoundaryLoss:
    """The boundary loss (AGEN Eq. 14), SEC's constrain-to-boundary: mean over pixels of KL(R || S).

    S is the softmax at a reduced size, R the dense CRF's marginals of it and of the image, over all K + 1 classes. No
    gradient flows through R. No probability of S or R is below about 1e-4, so that no logarithm is far off.

    Two steps, since the CRF runs on the processor and takes its time: the constructor starts it, in other processes
    where ``mapper`` has any, and ``value`` waits for it. Whatever is computed between the two is computed meanwhile.
    """

    def __init__(self, logits: Tensor, images: Tensor, grid: int, crf: Crf, mapper: Mapper) -> None:
        """
        Args:
            logits: B x (K + 1) x h x w.
            images: B x 3 x H x W, normalised.
            grid: cells on the long side of the reduced size.
            mapper: ``map``, or one over worker processes that starts at once.
        """
        height, width = logits.shape[2:]
        factor = grid / max(height, width)
        size = max(1, round(height * factor)), max(1, round(width * factor))
        logits = functional.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
        self.chances = (logits.softmax(1) + FLOOR) / (1 + FLOOR * logits.shape[1])
        given = self.chances.detach().cpu().numpy()
        self.marginals = mapper(dense_crf, photos(images, size), given, [crf] * len(given))

    def value(self) -> Tensor:
        refined = torch.from_numpy(np.stack(list(self.marginals))).to(self.chances.device).clamp_min(FLOOR)
        refined = refined / refined.sum(1, keepdim=True)
        return (refined * (refined.log() - self.chances.log())).sum(1).mean()


def photos(images: Tensor, size: Size) -> NDArray[Any]:
    """B x 3 x H x W normalised images as B x h x w x 3 uint8 at ``size``, by means over what each pixel covers."""
    reduced = functional.interpolate(images.detach().float(), size=size, mode="area").cpu().movedim(1, -1).numpy()
    return np.ascontiguousarray(np.rint((reduced * STD + MEAN) * 255).clip(0, 255).astype(np.uint8))
