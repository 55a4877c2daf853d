"""Anti-adversarial climbing (AdvCAM): maps of an image that changes step by step until its tag is beyond doubt.

Lee, Kim and Yoon, "Anti-Adversarially Manipulated Attributions" (CVPR 2021), which AMR's public code runs at inference.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.config.schema import Climbing
from pipeline.inference.batching import pixels_per_batch
from pipeline.methods.base import Method
from pipeline.training.settings import autocast

SHARE = 4  # of the pixels that go together without gradients, one of so many: the activations of a climb are kept


def climb(network: Method, images: Tensor, present: Sequence[Sequence[int]], settings: Climbing) -> Tensor:
    """Mean maps of the images and of all that their climbs pass through, each present class on its own climb.

    It costs ``iterations`` + 1 forward and ``iterations`` backward passes for each present class, where plain maps cost
    one forward pass for all: at 27 iterations and 1.5 classes an image about 100 times as much.

    Args:
        network: any classifier, in evaluation mode.
        images: B x 3 x H x W, normalised.
        present: of each image its classes, counted from 0.

    Returns:
        B x K x h x w non-negative maps; 0 for classes that are not present.
    """
    pairs = [(sample, number) for sample, classes in enumerate(present) for number in classes]
    samples, classes = torch.tensor(pairs, device=images.device).view(-1, 2).unbind(1)
    step = max(1, pixels_per_batch(images.device) // SHARE // (images.shape[2] * images.shape[3]))
    parts = [
        _climb(network, images[samples[at : at + step]], classes[at : at + step], settings)
        for at in range(0, len(pairs), step)
    ]
    out = parts[0].new_zeros(len(images), network.num_classes, *parts[0].shape[1:])
    out[samples, classes] = torch.cat(parts)
    return out


def _climb(network: Method, starts: Tensor, classes: Tensor, settings: Climbing) -> Tensor:
    """N x h x w: of each image's one class the mean map over its climb, first and last image included.

    A step goes up the gradient of a score, scaled so that the value that changes most changes by ``step``, and leaves
    no value outside of those that the image had at first. The score is the class's logit, minus those of the others as
    far as they are positive, minus ``weight`` times what the map has changed by, summed, where the current one is above
    ``threshold`` of its maximum: what is attended already shall not gain. The divisor, the bounds and the positive part
    of the others (a class that the image does not show need not become less) are the public code's.
    """
    images = starts.contiguous(memory_format=torch.channels_last)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    at = torch.arange(len(images), device=images.device), classes
    first: Tensor | None = None
    total: Tensor | None = None
    for remaining in range(settings.iterations, -1, -1):
        with torch.set_grad_enabled(remaining > 0):
            images = images.detach().requires_grad_(remaining > 0)
            with autocast(images.device, "auto"):
                output = network(images)
            maps = network.localization(output)[at]
            current = maps.detach()
            first = current if first is None else first
            total = current if total is None else total + current
            if remaining > 0:
                held = current > settings.threshold * current.amax((1, 2), keepdim=True)
                change = ((maps - first).abs() * held).sum((1, 2))
                logits = output.logits.float()
                others = logits.relu().sum(1) - logits[at].relu()
                score = logits[at] - others - settings.weight * change
                (gradient,) = torch.autograd.grad(score.sum(), images)
                largest = gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
                images = (images + settings.step * gradient / largest).clamp(low, high)
    assert total is not None
    return total / (settings.iterations + 1)
