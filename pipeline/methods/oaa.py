"""Online attention accumulation (OAA Sec. 3.2) and the attention drop layer (OAA Sec. 3.3, Alg. 1).

Both apply to the training of any classifier. The maps of all (image, tag) pairs are stored in one flat array in memory
(uint8 under 'max': about 16 MB for the 15,555 pairs of VOC train_aug at the paper's size). The public code instead
reads and writes one PNG per pair and epoch. Maps are keyed by image id and cover the whole image on a fixed grid. Flips
and crops are undone before a map is fused and redone before it occludes an input. Pairs with the same grid are
contiguous, so that the maps of a batch are fused as rows of one array and the array is written without copying.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.schema import Accumulate, AttentionDrop
from pipeline.data.geometry import Window, to_image, to_window
from pipeline.data.index import Image
from pipeline.data.streams import Purpose, rng
from pipeline.errors import PipelineError
from pipeline.stores.files import atomic
from pipeline.stores.raster import write_store

Grid = tuple[int, int]
WHOLE = (Window(), Window(flip=True))  # windows that cover the whole image


def attention(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale raw maps (... x h x w) to attention in [0, 1] (OAA Eq. 2); maps without positive values are 0."""
    positive = np.maximum(maps, np.zeros(maps.shape[-2:], np.float32))  # faster than with the scalar 0
    positive /= positive.max((-2, -1), keepdims=True, initial=1e-5)
    return positive


def passes(logits: Tensor, tags: Tensor, gate: str) -> NDArray[np.bool_]:
    """Which (sample, class) pairs pass the gate, B x K bool; only tagged classes can pass.

    Args:
        logits: B x K classification scores.
        tags: B x K, 0 or 1.
        gate: 'strict': the score exceeds those of all non-target classes (OAA Sec. 3.2); 'top_n': it is among the n
            highest scores of an image with n tags (the public code; more lenient for several tags); 'none': always.
    """
    tagged: NDArray[np.bool_] = tags.cpu().numpy() > 0
    if gate == "none":
        return tagged
    scores = logits.detach().float().cpu().numpy()
    if gate == "strict":
        return tagged & (scores > np.where(tagged, -np.inf, scores).max(1, keepdims=True))
    rank = (-scores).argsort(1, kind="stable").argsort(1)
    return tagged & (rank < tagged.sum(1, keepdims=True))


def _pick(maps: Tensor, samples: NDArray[np.intp], classes: NDArray[np.intp]) -> NDArray[np.float32]:
    """Copy the selected maps of B x K x h x w to a float32 array, N x h x w, in one transfer from a GPU."""
    if maps.is_cpu and maps.dtype == torch.float32:
        return maps.numpy()[samples, classes]  # a third of the time of torch's indexing
    return np.asarray(maps[torch.from_numpy(samples), torch.from_numpy(classes)].float().cpu())


def _grid(image: Image, cells: int) -> Grid:
    """Rows and columns of the image's maps, with ``cells`` cells on the short side."""
    short = min(image.height, image.width)
    return max(1, round(image.height * cells / short)), max(1, round(image.width * cells / short))


class _Block(NamedTuple):
    """Views of the accumulator's flat arrays for the pairs of one grid, one row per pair."""

    values: NDArray[np.float32 | np.uint8]  # pairs x cells, cumulative maps in [0, 255]
    counts: NDArray[np.uint16]  # number of maps averaged in each cell; no rows under 'max'
    last: NDArray[np.uint8]  # last maps; no rows if they are not stored
    seen: NDArray[np.bool_]  # whether the pair has a cumulative map
    has_last: NDArray[np.bool_]


class AttentionAccumulator:
    """Cumulative attention maps of all (training image, tag) pairs."""

    def __init__(self, images: Sequence[Image], settings: Accumulate, epochs: int, keep_last: bool = False) -> None:
        """
        Args:
            images: the training images; each has a grid with ``settings.cells`` cells on its short side.
            settings: fusion, gate, and epochs to skip.
            epochs: length of the training; in the last epoch, a pair that never passed the gate is accumulated as well.
            keep_last: also store each pair's last map, for the attention drop layer.
        """
        self.settings = settings
        self.last_epoch = epochs - 1
        self.images = list(images)
        self.grids = {image.id: _grid(image, settings.cells) for image in images}
        by_grid: dict[Grid, list[tuple[int, str, int]]] = {}  # pairs: number and id of the image, tag
        for number, image in enumerate(images):
            pairs = by_grid.setdefault(self.grids[image.id], [])
            pairs.extend((number, image.id, tag) for tag in image.tags)
        total = sum(rows * columns * len(pairs) for (rows, columns), pairs in by_grid.items())
        average = settings.fusion == "average"
        self._values: NDArray[np.float32 | np.uint8] = np.zeros(total, np.float32 if average else np.uint8)
        self._counts = np.zeros(total if average else 0, np.uint16)
        self._last = np.zeros(total if keep_last else 0, np.uint8)
        self._seen = np.zeros(sum(map(len, by_grid.values())), bool)
        self._has_last = np.zeros(len(self._seen), bool)
        self._blocks: dict[Grid, _Block] = {}
        self._rows: dict[str, dict[int, int]] = {image.id: {} for image in images}  # by image id and tag
        table = []
        pair = cell = 0
        for grid, pairs in by_grid.items():
            self._blocks[grid] = self._block(grid, slice(pair, pair + len(pairs)), cell)
            for row, (number, name, tag) in enumerate(pairs):
                self._rows[name][tag] = row
                table.append((number, tag, *grid, cell, pair))
                pair, cell = pair + 1, cell + grid[0] * grid[1]
        self._table = np.array(sorted(table), np.int64).reshape(-1, 6)  # ordered by image

    def _block(self, grid: Grid, pairs: slice, start: int) -> _Block:
        cells = grid[0] * grid[1]
        at = slice(start, start + (pairs.stop - pairs.start) * cells)
        return _Block(
            self._values[at].reshape(-1, cells),
            self._counts[at].reshape(-1, cells),
            self._last[at].reshape(-1, cells),
            self._seen[pairs],
            self._has_last[pairs],
        )

    def update(
        self, maps: Tensor, logits: Tensor, tags: Tensor, ids: Sequence[str], windows: Sequence[Window], epoch: int
    ) -> int:
        """Fuse a batch's attention into the cumulative maps (OAA Eq. 4).

        Args:
            maps: B x K x h x w raw class-aware maps over the windows.
            logits: B x K scores.
            tags: B x K, 0 or 1.
            ids: image ids.
            windows: position of each sample in its image.
            epoch: 0-based; the first ``skip_epochs`` epochs accumulate nothing, unless it is the last epoch.

        Returns:
            Number of fused maps.
        """
        if epoch < min(self.settings.skip_epochs, self.last_epoch):
            return 0
        if len(set(ids)) < len(ids):  # the rows of one fusion must be distinct
            samples = [slice(n, n + 1) for n in range(len(ids))]
            return sum(self.update(maps[n], logits[n], tags[n], ids[n], windows[n], epoch) for n in samples)
        passed = passes(logits, tags, self.settings.gate)
        fused = self._accumulate(passed, maps.detach(), ids, windows, keep=self._last.size > 0)
        if epoch == self.last_epoch:
            fused += self._accumulate(self._unseen(tags, ids), maps.detach(), ids, windows, keep=False)
        return fused

    def _unseen(self, tags: Tensor, ids: Sequence[str]) -> NDArray[np.bool_]:
        """Which tagged pairs have no cumulative map yet, B x K bool."""
        unseen: NDArray[np.bool_] = tags.cpu().numpy() > 0
        for sample, index in np.argwhere(unseen).tolist():
            name = ids[sample]
            unseen[sample, index] = not self._blocks[self.grids[name]].seen[self._rows[name][index + 1]]
        return unseen

    def _accumulate(
        self, selected: NDArray[np.bool_], maps: Tensor, ids: Sequence[str], windows: Sequence[Window], keep: bool
    ) -> int:
        """Undo the flips and crops of the ``selected`` maps (B x K bool) and fuse them; return their number.

        Raises:
            PipelineError: a map is not finite.
        """
        samples, classes = selected.nonzero()
        rows = np.array([self._rows[ids[n]][k + 1] for n, k in zip(samples.tolist(), classes.tolist(), strict=True)])
        values = attention(_pick(maps, samples, classes))
        if not np.isfinite(values).all():
            bad = ids[samples[~np.isfinite(values).all((1, 2))][0]]
            raise PipelineError(f"the attention contains NaN or infinity for image {bad}; lower training.lr")
        size = values.shape[1], values.shape[2]
        whole = [window in WHOLE and self.grids[name] == size for name, window in zip(ids, windows, strict=True)]
        if not all(whole):
            for sample in np.unique(samples).tolist():
                if not whole[sample]:
                    grid, mine = self.grids[ids[sample]], samples == sample
                    uncropped, inside = to_image(torch.from_numpy(values[mine]), windows[sample], grid)
                    self._fuse(self._blocks[grid], rows[mine], uncropped.numpy(), inside.numpy(), keep)
            rest = np.array(whole)[samples]
            samples, rows, values = samples[rest], rows[rest], values[rest]
        if len(rows):
            flips = [window.flip for window in windows]
            if any(flips):
                mine = np.array(flips)[samples]
                values[mine] = values[mine][:, :, ::-1]
            self._fuse(self._blocks[size], rows, values, None, keep)
        return len(classes)

    def _fuse(
        self,
        block: _Block,
        rows: NDArray[np.intp],
        maps: NDArray[np.float32],
        inside: NDArray[np.bool_] | None,
        keep: bool,
    ) -> None:
        """Fuse attention maps, N x grid rows x grid columns in [0, 1], into the N given rows of the block.

        Args:
            inside: which cells of the grid the sample covers; None: all.
            keep: also store the maps as the pairs' last maps.
        """
        values = maps.reshape(len(rows), -1) * 255
        levels = np.rint(values).astype(np.uint8)
        seen = None if inside is None else inside.reshape(-1)
        old = block.values.take(rows, 0)
        if self.settings.fusion == "max":  # OAA Eq. 5; cells outside the window are 0 and have no effect
            block.values[rows] = np.maximum(old, levels)
        else:  # OAA Eq. 10, with t counted per cell because a crop may exclude cells
            counts = block.counts[rows] + (np.uint16(1) if seen is None else seen)
            block.counts[rows] = counts
            step = (values - old) / np.maximum(counts, 1)
            block.values[rows] = old + (step if seen is None else np.where(seen, step, 0))
        block.seen[rows] = True
        if keep:
            block.last[rows] = levels if seen is None else np.where(seen, levels, block.last[rows])
            block.has_last[rows] = True

    def last(self, image_id: str, tag: int) -> Tensor | None:
        """The pair's last map that passed the gate, 1 x rows x columns in [0, 1]; None if there is none yet."""
        grid, row = self.grids[image_id], self._rows[image_id][tag]
        block = self._blocks[grid]
        if not block.has_last[row]:
            return None
        return torch.from_numpy(block.last[row].astype(np.float32) / 255).view(1, *grid)

    def share_seen(self) -> float:
        """Share of the pairs that have a cumulative map."""
        return float(self._seen.mean()) if self._seen.size else 0.0

    def mean_attention(self) -> float:
        """Mean over all cells of all cumulative maps, in [0, 1]; under 'max' it never decreases."""
        return float(self._values.mean(dtype=np.float64)) / 255 if self._values.size else 0.0

    def dump(self, path: Path) -> None:
        """Write all cumulative maps atomically as one raster store; pairs without a map are omitted."""
        numbers, tags, rows, columns, offsets, pairs = self._table.T
        table = np.stack([offsets, rows, columns, numbers, tags], 1)[self._seen[pairs]]
        values = self._values if self._values.dtype == np.uint8 else np.rint(self._values)
        levels = values.astype(np.uint8, copy=False)
        with atomic(path) as temporary:
            write_store(temporary, "attention", [image.id for image in self.images], table, levels)

    def state(self) -> dict[str, Any]:
        """The state to store in a checkpoint."""
        names = ("_values", "_seen", "_last", "_has_last")
        state = {name: torch.from_numpy(getattr(self, name).copy()) for name in names}
        return {**state, "_counts": torch.from_numpy(self._counts.astype(np.int32))}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the result of ``state``."""
        for name, value in state.items():
            getattr(self, name)[:] = value.numpy()  # in place: the blocks are views


class AttentionDropLayer:
    """Occludes the pixels that a pair's last attention map covers (OAA Alg. 1)."""

    def __init__(self, settings: AttentionDrop, accumulator: AttentionAccumulator, seed: int) -> None:
        self.settings = settings
        self.accumulator = accumulator
        self.numbers = {image.id: number for number, image in enumerate(accumulator.images)}
        self.seed = seed

    def mask(
        self, ids: Sequence[str], tags: Tensor, windows: Sequence[Window], size: tuple[int, int], epoch: int
    ) -> Tensor:
        """Compute which pixels to occlude.

        A sample is chosen with probability beta; the draw depends only on seed, epoch and image. In a chosen sample, a
        pixel is occluded if the last attention map of any tag, resized to the input, exceeds delta there. The last map
        is the last one that passed the gate.

        Args:
            ids: image ids.
            tags: B x K, 0 or 1.
            windows: position of each sample in its image.
            size: H and W of the input.
            epoch: 0-based.

        Returns:
            B x 1 x H x W bool on the CPU.
        """
        out = torch.zeros(len(ids), 1, *size, dtype=torch.bool)
        pairs = tags.detach().cpu().nonzero().tolist()
        drawn = [rng(self.seed, Purpose.OCCLUSION, epoch, self.numbers[name]).random() for name in ids]
        for sample, class_index in pairs:
            if drawn[sample] >= self.settings.beta:
                continue
            last = self.accumulator.last(ids[sample], class_index + 1)
            if last is not None:
                out[sample] |= to_window(last, windows[sample], size) > self.settings.delta
        return out
