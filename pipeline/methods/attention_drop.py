"""The attention drop layer (OAA Sec. 3.3, Alg. 1), which applies to the training of any classifier."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.schema import AttentionDrop
from pipeline.data.geometry import Window
from pipeline.data.streams import Purpose, rng
from pipeline.methods.oaa import AttentionAccumulator, resampled


class AttentionDropLayer:
    """Occludes the pixels that a pair's last attention map covers (OAA Alg. 1)."""

    def __init__(self, settings: AttentionDrop, accumulator: AttentionAccumulator, seed: int) -> None:
        self.settings = settings
        self.accumulator = accumulator
        self.numbers = {image.id: number for number, image in enumerate(accumulator.images)}
        self.seed = seed

    def mask(
        self,
        ids: Sequence[str],
        tags: Tensor,
        windows: Sequence[Window],
        size: tuple[int, int],
        epoch: int,
        device: torch.device,
    ) -> Tensor:
        """Compute which pixels to occlude.

        A sample is chosen with probability beta; the draw depends only on seed, epoch and image. In a chosen sample, a
        pixel is occluded if the last attention map of any tag, resized to the input, exceeds delta there. The last map
        is the last one that passed the gate.

        Args:
            ids: image ids.
            tags: B x K, 0 or 1, on the CPU.
            windows: position of each sample in its image.
            size: H and W of the input.
            epoch: 0-based.
            device: where the maps are resized.

        Returns:
            B x 1 x H x W bool on the device.
        """
        out = torch.zeros(len(ids), 1, *size, dtype=torch.bool, device=device)
        drawn = [rng(self.seed, Purpose.OCCLUSION, epoch, self.numbers[name]).random() for name in ids]
        maps: dict[tuple[int, int], NDArray[np.uint8]] = {}
        for sample, class_index in tags.nonzero().tolist():
            if drawn[sample] >= self.settings.beta:
                continue
            last = self.accumulator.last(ids[sample], class_index + 1)
            if last is not None:
                maps[sample, class_index] = last
        for (sample, _), values in resampled(maps, windows, size, device):
            out[sample] |= values > self.settings.delta
        return out
