"""The losses of segmentation networks."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.data.loading import IGNORE


def segmentation_loss(
    supervised: Sequence[Tensor],
    labels: Tensor,
    tags: Tensor,
    loss_size: Literal["input", "output"] = "input",
    self_training: bool = False,
) -> Tensor:
    """The sum over all supervised logits of their cross entropy with the labels (DeepLab-v2: 1x, 0.75x, 0.5x, maximum).

    Args:
        supervised: each B x (K + 1) x h x w in float32, at any size, background first.
        labels: B x H x W class ids; 255 is ignored.
        tags: B x K, 0 or 1; only self-training looks at them.
        loss_size: 'input': logits are upsampled (bilinear) to the labels; 'output': labels are reduced (nearest pixel)
            to the size of each of the logits.
        self_training: add to each cross entropy an equal one with the network's own answer (see ``own_answer``), at
            every pixel, also where the label is 255 (the undocumented term of DRS's public code).
    """
    total = torch.zeros((), device=labels.device)
    for logits in supervised:
        target = labels
        if loss_size == "input":
            size = [int(side) for side in labels.shape[1:]]
            logits = functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        else:
            target = reduced(labels, logits.shape[2:])
        total = total + cross_entropy(logits, target)
        if self_training:
            total = total + cross_entropy(logits, own_answer(logits, tags))
    return total


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over all labelled pixels of the batch; 0 where there are none.

    Args:
        logits: B x (K + 1) x h x w.
        labels: B x h x w class ids; 255 is ignored.
    """
    # As rows, since the kernel for images is not deterministic on CUDA.
    rows, classes = logits.movedim(1, -1).flatten(0, -2), labels.flatten()
    total = functional.cross_entropy(rows, classes, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp_min(1)


def own_answer(logits: Tensor, tags: Tensor) -> Tensor:
    """The most likely of background and the image's tags at each pixel, B x h x w; no gradient flows through it.

    Absent classes count -inf. Multiplied with 0, as in DRS's public code, one of them would win wherever the logits of
    all present ones are negative.
    """
    present = functional.pad(tags, (1, 0), value=1.0) > 0
    return logits.detach().masked_fill(~present[:, :, None, None], -torch.inf).argmax(1)


def reduced(labels: Tensor, size: Sequence[int]) -> Tensor:
    """B x H x W labels at another size: each pixel takes the label under its centre."""
    rows, columns = (
        (2 * torch.arange(after, device=labels.device) + 1) * before // (2 * after)
        for before, after in zip(labels.shape[1:], size, strict=True)
    )
    return labels[:, rows][:, :, columns]
