"""Losses of segmentation networks."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.data.loading import IGNORE
from pipeline.training.distributed import ratio


def segmentation_loss(
    supervised: Sequence[Tensor],
    labels: Tensor,
    tags: Tensor,
    loss_size: Literal["input", "output"] = "input",
    self_training: bool = False,
) -> Tensor:
    """Sum of the cross entropies of all supervised logits (in DeepLab-v2: 1x, 0.75x, 0.5x and maximum).

    Args:
        supervised: logits, each B x (K + 1) x h x w in float32 at any size, background first.
        labels: B x H x W class ids; 255 is ignored.
        tags: B x K, 0 or 1; used only by self-training.
        loss_size: 'input': upsample the logits bilinearly to the labels; 'output': reduce the labels (nearest pixel)
            to each of the logits.
        self_training: add the cross entropy with the network's own prediction (``own_prediction``) at every pixel,
            including those labelled 255 (the undocumented term of DRS's public code).
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
            total = total + cross_entropy(logits, own_prediction(logits, tags))
    return total


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy averaged over all labelled pixels of the batch; 0 if there are none.

    Args:
        logits: B x (K + 1) x h x w.
        labels: B x h x w class ids; 255 is ignored.
    """
    # N x C logits, because the CUDA kernel for B x C x H x W logits is not deterministic.
    pixels, classes = logits.movedim(1, -1).flatten(0, -2), labels.flatten()
    total = functional.cross_entropy(pixels, classes, ignore_index=IGNORE, reduction="sum")
    return ratio(total, (labels != IGNORE).sum())


def own_prediction(logits: Tensor, tags: Tensor) -> Tensor:
    """The most likely class at each pixel among background and the image's tags, B x h x w, without gradient.

    Logits of absent classes are set to -inf. DRS's public code multiplies them by 0 instead, so that an absent class
    wins wherever the logits of all present classes are negative.
    """
    present = functional.pad(tags, (1, 0), value=1.0) > 0
    return logits.detach().masked_fill(~present[:, :, None, None], -torch.inf).argmax(1)


def reduced(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Resize B x H x W labels to ``size``: each pixel takes the label at its centre."""
    rows, columns = (
        (2 * torch.arange(after, device=labels.device) + 1) * before // (2 * after)
        for before, after in zip(labels.shape[1:], size, strict=True)
    )
    return labels[:, rows][:, :, columns]
