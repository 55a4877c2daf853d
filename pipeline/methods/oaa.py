"""Online attention accumulation (OAA Sec. 3.2).

It applies to the training of any classifier. The maps of all (image, tag) pairs are stored in one flat array in memory
(uint8 under 'max': about 16 MB for the 15,555 pairs of VOC train_aug at the paper's size). The public code instead
reads and writes one PNG per pair and epoch. Maps are keyed by image id and cover the whole image on a fixed grid. Flips
and crops are undone before a map is fused and redone before it occludes an input. Pairs with the same grid are
contiguous, so that the maps of a batch are fused as rows of one array and the array is written without copying.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.schema import Accumulate
from pipeline.data.collation import on_device
from pipeline.data.geometry import Window, to_image, to_windows
from pipeline.data.index import Image
from pipeline.errors import PipelineError
from pipeline.stores.files import atomic
from pipeline.stores.raster import write_store
from pipeline.training import distributed

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


class Taken(NamedTuple):
    """The maps of a batch's tagged pairs, on their way to the accumulator."""

    maps: Tensor  # P x h x w float32, raw, on the CPU
    logits: Tensor  # B x K float32, on the CPU
    tags: Tensor  # B x K, on the CPU
    samples: NDArray[np.intp]  # of each pair
    classes: NDArray[np.intp]  # index of each pair's class
    ids: Sequence[str]
    windows: Sequence[Window]
    epoch: int
    ready: torch.cuda.Event | None  # after which a GPU has written the values


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
        self.images = images
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
        self._fused: set[str] = set()  # images whose maps this process has fused since it merged
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

    def tags(self, ids: Sequence[str], num_classes: int) -> Tensor:
        """The tags of these images, B x K, on the CPU."""
        rows = torch.zeros(len(ids), num_classes)
        for row, name in zip(rows.numpy(), ids, strict=True):
            row[[tag - 1 for tag in self._rows[name]]] = 1
        return rows

    def update(
        self, maps: Tensor, logits: Tensor, tags: Tensor, ids: Sequence[str], windows: Sequence[Window], epoch: int
    ) -> int:
        """Fuse a batch's attention into the cumulative maps (OAA Eq. 4); return the number of fused maps."""
        taken = self.take(maps, logits, tags, ids, windows, epoch)
        return 0 if taken is None else self.fuse(taken)

    def take(
        self, maps: Tensor, logits: Tensor, tags: Tensor, ids: Sequence[str], windows: Sequence[Window], epoch: int
    ) -> Taken | None:
        """Begin to copy a batch's maps to the CPU, without waiting for a GPU; ``fuse`` waits.

        Args:
            maps: B x K x h x w raw class-aware maps over the windows.
            logits: B x K scores.
            tags: B x K, 0 or 1, on the CPU.
            ids: image ids.
            windows: position of each sample in its image.
            epoch: 0-based; the first ``skip_epochs`` epochs accumulate nothing, unless it is the last epoch.

        Returns:
            The maps, or None in an epoch that accumulates nothing.
        """
        if epoch < min(self.settings.skip_epochs, self.last_epoch):
            return None
        samples, classes = (tags.numpy() > 0).nonzero()
        maps, logits, ready = maps.detach(), logits.detach().float(), None
        if maps.is_cuda:
            at = torch.from_numpy(np.stack([samples, classes])).pin_memory().to(maps.device, non_blocking=True)
            picked = maps[at[0], at[1]].float().to("cpu", non_blocking=True)
            logits = logits.to("cpu", non_blocking=True)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        elif maps.dtype == torch.float32:
            picked = torch.from_numpy(maps.numpy()[samples, classes])  # a third of the time of torch's indexing
        else:
            picked = maps[torch.from_numpy(samples), torch.from_numpy(classes)].float()
        return Taken(picked, logits, tags, samples, classes, ids, windows, epoch, ready)

    def fuse(self, taken: Taken) -> int:
        """Fuse the maps of ``take`` into the cumulative maps (OAA Eq. 4); return the number of fused maps.

        Raises:
            PipelineError: a map is not finite.
        """
        if taken.ready is not None:
            taken.ready.synchronize()
        self._fused.update(taken.ids)
        passed = passes(taken.logits, taken.tags, self.settings.gate)[taken.samples, taken.classes]
        groups = [slice(None)]
        if len(set(taken.ids)) < len(taken.ids):  # the rows of one fusion must be distinct
            ends = np.searchsorted(taken.samples, np.arange(len(taken.ids) + 1)).tolist()
            groups = list(map(slice, ends[:-1], ends[1:]))
        fused = 0
        for group in groups:
            chosen = np.zeros(len(passed), bool)
            chosen[group] = passed[group]
            fused += self._accumulate(taken, chosen, keep=self._last.size > 0)
            if taken.epoch == self.last_epoch:
                chosen[group] = self._unseen(taken)[group]
                fused += self._accumulate(taken, chosen, keep=False)
        return fused

    def _pair_rows(self, taken: Taken, chosen: NDArray[np.bool_]) -> NDArray[np.intp]:
        """Rows of the chosen pairs in their blocks."""
        pairs = zip(taken.samples[chosen].tolist(), taken.classes[chosen].tolist(), strict=True)
        return np.array([self._rows[taken.ids[sample]][k + 1] for sample, k in pairs], np.intp)

    def _unseen(self, taken: Taken) -> NDArray[np.bool_]:
        """Which of the pairs have no cumulative map yet."""
        rows = self._pair_rows(taken, np.ones(len(taken.samples), bool)).tolist()
        names = [taken.ids[sample] for sample in taken.samples.tolist()]
        return np.array(
            [not self._blocks[self.grids[name]].seen[row] for name, row in zip(names, rows, strict=True)], bool
        )

    def _accumulate(self, taken: Taken, chosen: NDArray[np.bool_], keep: bool) -> int:
        """Undo the flips and crops of the chosen pairs' maps and fuse them; return their number.

        Raises:
            PipelineError: a map is not finite.
        """
        ids, windows, samples = taken.ids, taken.windows, taken.samples[chosen]
        rows = self._pair_rows(taken, chosen)
        values = attention(taken.maps.numpy()[chosen])
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
        return int(chosen.sum())

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

    def merge(self) -> None:
        """Take over the maps that the other processes of this training have fused since the last call.

        Within an epoch each image belongs to one process, so that the result is that of a single process.
        """
        if distributed.processes() > 1:
            mine = np.array([name in self._fused for name in self._rows], bool)
            numbers, rows, columns = self._table[np.argsort(self._table[:, 5])].T[[0, 2, 3]]
            cells = np.repeat(mine[numbers], rows * columns)
            for values in (self._values, self._counts, self._last):
                if values.size:
                    distributed.exchange(values, cells)
            for flags in (self._seen, self._has_last):
                distributed.exchange(flags, mine[numbers])
        self._fused.clear()

    def last(self, image_id: str, tag: int) -> NDArray[np.uint8] | None:
        """The pair's last map that passed the gate, rows x columns in levels of 255; None if there is none yet."""
        grid, row = self.grids[image_id], self._rows[image_id][tag]
        block = self._blocks[grid]
        if not block.has_last[row]:
            return None
        return block.last[row].reshape(grid)

    def cumulative(
        self, ids: Sequence[str], tags: Tensor, windows: Sequence[Window], size: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Resample the cumulative maps of a batch to its windows.

        Args:
            ids: image ids.
            tags: B x K, 0 or 1, on the CPU.
            windows: position of each sample in its image.
            size: rows and columns of the result.
            device: where the maps are resampled.

        Returns:
            B x K x rows x columns attention in [0, 1] on the device, 0 for pairs without a map; and B bool on the CPU:
            whether all tags of a sample have a map.
        """
        maps: dict[tuple[int, int], NDArray[Any]] = {}
        known = torch.ones(len(ids), dtype=torch.bool)
        for sample, class_index in tags.nonzero().tolist():
            grid, row = self.grids[ids[sample]], self._rows[ids[sample]][class_index + 1]
            block = self._blocks[grid]
            if block.seen[row]:
                maps[sample, class_index] = block.values[row].reshape(grid)
            else:
                known[sample] = False
        out = torch.zeros(*tags.shape, *size, device=device)
        for (sample, class_index), values in resampled(maps, windows, size, device):
            out[sample, class_index] = values
        return out, known

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


def resampled(
    maps: Mapping[tuple[int, int], NDArray[Any]],
    windows: Sequence[Window],
    size: tuple[int, int],
    device: torch.device,
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Resample stored maps (levels of 255) by sample and class to the samples' windows, on the device, in [0, 1]."""
    by_grid: dict[Grid, list[tuple[int, int]]] = {}
    for pair, values in maps.items():
        by_grid.setdefault((values.shape[0], values.shape[1]), []).append(pair)
    for pairs in by_grid.values():
        levels = on_device(torch.from_numpy(np.stack([maps[pair] for pair in pairs])), device).float() / 255
        yield from zip(pairs, to_windows(levels, [windows[sample] for sample, _ in pairs], size), strict=True)
