"""The integral attention model of OAA+ (OAA Sec. 3.4): a network trained on cumulative attention maps."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config.reader import Range
from pipeline.config.registry import REFINEMENTS
from pipeline.refinement.base import RefinementNetwork, Target


def integral_loss(
    logits: Tensor,
    attention: Tensor,
    tags: Tensor,
    loss: str = "hybrid",
    reduction: str = "class",
    threshold: float = 0.0,
) -> Tensor:
    """Loss of the integral attention model, averaged over the batch.

    Args:
        logits: B x K x h x w scores of the class-aware convolution.
        attention: B x K x h x w cumulative attention p in [0, 1]; 0 for absent classes.
        tags: B x K, 0 or 1.
        loss: 'hybrid': enhance + constraint loss (OAA Eq. 9); 'enhance': the first part only (OAA Eq. 7);
            'cross_entropy': multi-label cross entropy over all pixels (OAA Eq. 6). Table 4 calls them HL, EP and MCE.
        reduction: 'class': average over N+ and N- of each class, then sum over classes (the paper); 'present': sum over
            the image's tags alone, another reading of the paper's sum; 'pooled': all classes and pixels of an image
            form one N+ and one N- (the public code).
        threshold: a pixel belongs to N+ if p exceeds this value (OAA Table 5).

    Returns:
        A scalar. log q is computed with logsigmoid, so the loss stays finite and its gradient does not vanish.
    """
    logits = logits.float()
    log_q, log_not_q = functional.logsigmoid(logits), functional.logsigmoid(-logits)
    dims = (1, 2, 3) if reduction == "pooled" else (2, 3)
    present = tags if reduction == "present" else None
    if loss == "cross_entropy":
        losses = -(attention * log_q + (1 - attention) * log_not_q)
        return _total(losses.mean(dims), present)
    positive = ((attention > threshold) & (tags[:, :, None, None] > 0)).float()
    enhance = -(positive * attention * log_q).sum(dims) / positive.sum(dims).clamp_min(1)
    if loss == "enhance":
        return _total(enhance, present)
    negative = 1 - positive
    constraint = -(negative * log_not_q).sum(dims) / negative.sum(dims).clamp_min(1)
    return _total(enhance + constraint, present)


def _total(per_item: Tensor, present: Tensor | None) -> Tensor:
    """Mean over the batch of per-image losses (B) or of per-class losses (B x K), which are summed over classes.

    Args:
        present: B x K, 1 for the classes to sum over; None: all.
    """
    if present is not None:
        per_item = per_item * present
    return per_item.sum(1).mean() if per_item.dim() == 2 else torch.mean(per_item)


@REFINEMENTS.register("integral")
class IntegralModel(RefinementNetwork):
    """The classification network of OAA without global average pooling; its class-aware maps are the attention."""

    @dataclass(frozen=True)
    class Settings:
        """Settings of the loss; see ``integral_loss``."""

        loss: Literal["hybrid", "cross_entropy", "enhance"] = "hybrid"  # OAA Eq. 9, 6, 7 (Table 4: HL, MCE, EP)
        # Sum of the means of all classes (paper) or of the image's tags, or pooled (code)
        reduction: Literal["class", "present", "pooled"] = "class"
        threshold: Annotated[float, Range(least=0, below=1)] = 0.0  # attention above which a pixel is in N+ (Table 5)

    settings: Settings

    def describe(self) -> str:
        return "integral"

    @property
    def is_mean(self) -> bool:
        return True

    def loss(self, images: Tensor, target: Target, tags: Tensor) -> Tensor:
        logits = self(images)
        settings = self.settings
        attention = target((logits.shape[2], logits.shape[3]))
        return integral_loss(logits, attention, tags, settings.loss, settings.reduction, settings.threshold)
