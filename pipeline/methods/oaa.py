"""Online attention accumulation (OAA Sec. 3.2) and the attention drop layer (OAA Sec. 3.3, Alg. 1).

Both wrap the training of any classifier. The maps of all (image, tag) pairs live in one flat uint8 array in memory:
about 16 MB for the 15,555 pairs of VOC train_aug at the paper's size, where the public code reads and writes a PNG for
each pair and epoch. They are keyed by image id and cover the whole image on a fixed grid; flips and crops are undone
before a map is fused, and redone before it occludes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.geometry import Window, to_image, to_window
from pipeline.data.index import Image
from pipeline.schema import Accumulate, AttentionDrop
from pipeline.stores.files import atomic
from pipeline.stores.raster import RasterWriter


def attention(maps: Tensor) -> Tensor:
    """Raw class-aware maps (... x h x w) -> attention in [0, 1] (OAA Eq. 2); a map without a positive value is 0."""
    positive = maps.float().relu()
    return positive / positive.amax((-2, -1), keepdim=True).clamp_min(1e-5)


def passes(logits: Tensor, tags: Tensor, gate: str) -> Tensor:
    """Which (sample, class) pairs may accumulate, B x K bool; only tagged classes ever pass.

    Args:
        logits: B x K classification scores.
        tags: B x K, 0 or 1.
        gate: 'strict': the score is above those of all non-target classes (OAA Sec. 3.2); 'top_n': it is among the n
            highest of the image, n its number of tags (the public code; more lenient with several tags); 'none'.
    """
    tagged = tags > 0
    if gate == "none":
        return tagged
    if gate == "strict":
        best = logits.masked_fill(tagged, -torch.inf).amax(1, keepdim=True)
        return tagged & (logits > best)
    rank = logits.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return tagged & (rank < tagged.sum(1, keepdim=True))


class AttentionAccumulator:
    """Cumulative attention maps of all (training image, tag) pairs."""

    def __init__(self, images: Sequence[Image], settings: Accumulate, epochs: int, keep_last: bool = False) -> None:
        """
        Args:
            images: the training images; each keeps a grid with ``settings.cells`` cells on its short side.
            settings: fusion, gate, epochs to skip.
            epochs: of the training; in the last one a pair that never passed the gate takes its map all the same.
            keep_last: also keep each pair's last map, for the attention drop layer.
        """
        self.settings = settings
        self.last_epoch = epochs - 1
        self.images = list(images)
        self.grids: dict[str, tuple[int, int]] = {}
        self._pairs: dict[tuple[str, int], int] = {}
        starts = [0]
        for image in images:
            short = min(image.height, image.width)
            cells = settings.cells
            grid = max(1, round(image.height * cells / short)), max(1, round(image.width * cells / short))
            self.grids[image.id] = grid
            for tag in image.tags:
                self._pairs[image.id, tag] = len(starts) - 1
                starts.append(starts[-1] + grid[0] * grid[1])
        self._starts = np.array(starts)
        average = settings.fusion == "average"
        self._values: NDArray[np.float32 | np.uint8] = np.zeros(starts[-1], np.float32 if average else np.uint8)
        self._counts = np.zeros(starts[-1], np.uint16) if average else np.zeros(0, np.uint16)
        self._seen = np.zeros(len(self._pairs), np.int32)
        self._last = np.zeros(starts[-1] if keep_last else 0, np.uint8)
        self._has_last = np.zeros(len(self._pairs), bool)

    def _slice(self, pair: int) -> slice:
        return slice(int(self._starts[pair]), int(self._starts[pair + 1]))

    def update(
        self, maps: Tensor, logits: Tensor, tags: Tensor, ids: Sequence[str], windows: Sequence[Window], epoch: int
    ) -> int:
        """Fuse a batch's attention into the cumulative maps (OAA Eq. 4).

        Args:
            maps: B x K x h x w raw class-aware maps over the windows.
            logits: B x K scores.
            tags: B x K, 0 or 1.
            ids: image ids.
            windows: where each sample lies in its image.
            epoch: 0-based; nothing is accumulated in the first ``skip_epochs``, but in the last one always.

        Returns:
            How many maps were fused.
        """
        if epoch < min(self.settings.skip_epochs, self.last_epoch):
            return 0
        passed = passes(logits.detach().float(), tags, self.settings.gate).cpu().numpy()
        samples, classes = tags.detach().nonzero(as_tuple=True)
        found = attention(maps.detach()[samples, classes]).cpu()  # of the tags alone: the others' maps are not wanted
        levels = found.numpy() * 255
        fused = 0
        for row, (sample, class_index) in enumerate(zip(samples.tolist(), classes.tolist(), strict=True)):
            pair = self._pairs[ids[sample], class_index + 1]
            through = bool(passed[sample, class_index])
            if not through and not (epoch == self.last_epoch and self._seen[pair] == 0):
                continue
            grid, window = self.grids[ids[sample]], windows[sample]
            if levels.shape[1:] == grid and window[:4] == Window()[:4]:  # the whole image, cell by cell
                self._fuse(pair, levels[row, :, ::-1] if window.flip else levels[row], None, through)
            else:
                whole, inside = to_image(found[row, None], window, grid)
                self._fuse(pair, whole[0].numpy() * 255, inside.numpy().reshape(-1), through)
            fused += 1
        return fused

    def _fuse(self, pair: int, values: NDArray[np.float32], inside: NDArray[np.bool_] | None, through: bool) -> None:
        """Fuse rows x columns ``values`` in levels of 255; ``inside`` is None where all of the image was seen."""
        at = self._slice(pair)
        levels = np.rint(values).astype(np.uint8).reshape(-1)
        if self.settings.fusion == "max":  # OAA Eq. 5; a pixel outside of the window holds 0 and changes nothing
            np.maximum(self._values[at], levels, out=self._values[at])
        else:  # OAA Eq. 10, t counted cell by cell, as a crop may leave cells out
            seen = np.ones(levels.shape, bool) if inside is None else inside
            self._counts[at] += seen.astype(np.uint16)
            step = np.where(seen, (values.reshape(-1) - self._values[at]) / np.maximum(self._counts[at], 1), 0)
            self._values[at] += step.astype(np.float32)
        self._seen[pair] += 1
        if self._last.size and through:
            self._last[at] = levels if inside is None else np.where(inside, levels, self._last[at])
            self._has_last[pair] = True

    def last(self, image_id: str, tag: int) -> Tensor | None:
        """The pair's last map that passed the gate, 1 x rows x columns in [0, 1], or None before there is one."""
        pair = self._pairs[image_id, tag]
        if not self._has_last[pair]:
            return None
        return torch.from_numpy(self._last[self._slice(pair)].astype(np.float32) / 255).view(1, *self.grids[image_id])

    def share_seen(self) -> float:
        """Share of the pairs that hold at least one map."""
        return float((self._seen > 0).mean()) if self._seen.size else 0.0

    def mean_attention(self) -> float:
        """Mean over all cells of all cumulative maps, in [0, 1]: it can only grow under 'max'."""
        return float(self._values.mean(dtype=np.float64)) / 255 if self._values.size else 0.0

    def dump(self, path: Path) -> None:
        """Write all cumulative maps as one raster store, atomically; a pair never seen is left out."""
        with atomic(path) as temporary, RasterWriter(temporary, "attention") as writer:
            for image in self.images:
                writer.add_image(image.id)
                for tag in image.tags:
                    pair = self._pairs[image.id, tag]
                    if self._seen[pair]:
                        values = self._values[self._slice(pair)]
                        levels = values if values.dtype == np.uint8 else np.rint(values)
                        writer.append(image.id, levels.astype(np.uint8).reshape(self.grids[image.id]), tag)

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        names = ("_values", "_seen", "_last", "_has_last")
        state = {name: torch.from_numpy(getattr(self, name).copy()) for name in names}
        return {**state, "_counts": torch.from_numpy(self._counts.astype(np.int32))}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` gave."""
        for name, value in state.items():
            setattr(self, name, value.numpy().astype(getattr(self, name).dtype))


class AttentionDropLayer:
    """Occludes what a pair's last attention map has already found (OAA Alg. 1)."""

    def __init__(self, settings: AttentionDrop, accumulator: AttentionAccumulator, seed: int) -> None:
        self.settings = settings
        self.accumulator = accumulator
        self.numbers = {image.id: number for number, image in enumerate(accumulator.images)}
        self.seed = seed

    def mask(
        self, ids: Sequence[str], tags: Tensor, windows: Sequence[Window], size: tuple[int, int], epoch: int
    ) -> Tensor:
        """Which pixels to occlude.

        A sample is occluded with probability beta, drawn from seed, epoch and image alone; then every pixel is, whose
        last attention of any tag, resized to the input, is above delta. The last map is the last that passed the gate.

        Returns:
            B x 1 x H x W bool on the CPU.
        """
        out = torch.zeros(len(ids), 1, *size, dtype=torch.bool)
        pairs = tags.detach().cpu().nonzero().tolist()
        drawn = [np.random.default_rng([self.seed, epoch, self.numbers[name], 1]).random() for name in ids]
        for sample, class_index in pairs:
            if drawn[sample] >= self.settings.beta:
                continue
            last = self.accumulator.last(ids[sample], class_index + 1)
            if last is not None:
                out[sample] |= to_window(last, windows[sample], size) > self.settings.delta
        return out
