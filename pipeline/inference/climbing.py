"""Anti-adversarial climbing (AdvCAM): maps of an image that is changed step by step to raise the score of its class.

Lee, Kim and Yoon, "Anti-Adversarially Manipulated Attributions" (CVPR 2021). AMR's public code uses it for inference.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.config.views import Climbing
from pipeline.inference.batching import pixels_per_batch
from pipeline.methods.base import Method
from pipeline.training.settings import autocast

SHARE = 4  # batches are smaller by this factor than without gradients, because activations are stored


def climb(
    network: Method,
    images: Tensor,
    present: Sequence[Sequence[int]],
    settings: Climbing,
    precision: str = "auto",
) -> Tensor:
    """Average the maps of each image over all steps of its climb, with a separate climb for each present class.

    The cost is ``iterations`` + 1 forward and ``iterations`` backward passes per present class. Plain maps take one
    forward pass for all classes. With 27 iterations and 1.5 classes per image, climbing costs about 100 times as much.

    Args:
        network: any classifier, in evaluation mode.
        images: B x 3 x H x W, normalised.
        present: the 0-based classes of each image.

    Returns:
        B x K x h x w non-negative maps; 0 for classes that are not present.
    """
    pairs = [(sample, number) for sample, classes in enumerate(present) for number in classes]
    samples, classes = torch.tensor(pairs, device=images.device).view(-1, 2).unbind(1)
    step = max(1, pixels_per_batch(images.device) // SHARE // (images.shape[2] * images.shape[3]))
    parts = [
        _climb(network, images[samples[at : at + step]], classes[at : at + step], settings, precision)
        for at in range(0, len(pairs), step)
    ]
    out = parts[0].new_zeros(len(images), network.num_classes, *parts[0].shape[1:])
    out[samples, classes] = torch.cat(parts)
    return out


def _climb(network: Method, starts: Tensor, classes: Tensor, settings: Climbing, precision: str) -> Tensor:
    """Mean map over the climb of each image's one class, N x h x w, including the first and the last image.

    A step follows the gradient of a score, scaled so that the largest change of a value is ``step``, and clips the
    image to the range of its initial values. The score is the logit of the class, minus the positive parts of the other
    logits, minus ``weight`` times a penalty. The penalty sums the absolute changes of the map since the first step over
    the cells where the current map exceeds ``threshold`` of its maximum, so that regions already attended do not gain.
    The scaling, the clipping and the positive parts (logits of absent classes need not fall) follow the public code.
    """
    images = starts.contiguous(memory_format=torch.channels_last)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    at = torch.arange(len(images), device=images.device), classes
    first: Tensor | None = None
    total: Tensor | None = None
    for remaining in range(settings.iterations, -1, -1):
        with torch.set_grad_enabled(remaining > 0):
            images = images.detach().requires_grad_(remaining > 0)
            with autocast(images.device, precision):
                output = network(images)
            maps = network.localization(output)[at]
            current = maps.detach()
            first = current if first is None else first
            total = current if total is None else total + current
            if remaining > 0:
                attended = current > settings.threshold * current.amax((1, 2), keepdim=True)
                change = ((maps - first).abs() * attended).sum((1, 2))
                logits = output.logits.float()
                others = logits.relu().sum(1) - logits[at].relu()
                score = logits[at] - others - settings.weight * change
                (gradient,) = torch.autograd.grad(score.sum(), images)
                largest = gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
                images = (images + settings.step * gradient / largest).clamp(low, high)
    assert total is not None
    return total / (settings.iterations + 1)
