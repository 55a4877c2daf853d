"""What the attention accumulator holds in memory, and the cases at its edges: one cell, no tags, many classes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.schema import Accumulate
from pipeline.data.geometry import Window
from pipeline.data.index import Image
from pipeline.methods.oaa import AttentionAccumulator, passes
from tests.test_oaa import ALL, GRID, IMAGES, WHOLE, K, accumulator, dumped, feed

PAIRS = 8  # of IMAGES


@pytest.mark.parametrize("fusion", ["max", "average"])
@pytest.mark.parametrize("keep_last", [False, True])
def test_memory_is_a_byte_a_cell_unless_more_is_asked_for(fusion: Any, keep_last: bool) -> None:
    found = AttentionAccumulator(IMAGES, Accumulate(fusion, "none", 0, cells=4), 2, keep_last)
    average, cells = fusion == "average", PAIRS * 24
    assert found._counts.dtype == np.uint16
    assert {name: (values.dtype, values.numel()) for name, values in found.state().items()} == {
        "_values": (torch.float32 if average else torch.uint8, cells),
        "_counts": (torch.int32, cells if average else 0),
        "_last": (torch.uint8, cells if keep_last else 0),
        "_seen": (torch.bool, PAIRS),
        "_has_last": (torch.bool, PAIRS),
    }


def test_the_last_maps_are_kept_on_request_alone() -> None:
    assert not AttentionAccumulator(IMAGES, ALL, 2).state()["_last"].numel()


def test_each_pair_has_one_row_of_its_grid() -> None:
    """Three grids whose sizes do not divide each other, with 2, 3 and 1 pairs; a pair's maps reach no other's."""
    images = [
        Image(name, Path(), height, width, tags, None, None)
        for name, height, width, tags in [
            ("wide", 40, 50, (1, 2)), ("tall", 70, 40, (1, 3, 4)), ("square", 40, 40, (2,))
        ]
    ]  # fmt: skip
    found = AttentionAccumulator(images, ALL, 2, keep_last=True)
    assert {grid: block.values.shape for grid, block in found._blocks.items()} == {
        (4, 5): (2, 20), (7, 4): (3, 28), (4, 4): (1, 16)
    }  # fmt: skip
    assert {len(block.seen) for block in found._blocks.values()} == {1, 2, 3}
    assert all(block.last.shape == block.values.shape for block in found._blocks.values())


def test_a_grid_of_one_cell() -> None:
    """The whole of an image's attention in one number, its last one kept."""
    image = Image("a", Path(), 40, 40, (2,), None, None)
    found = AttentionAccumulator([image], Accumulate(gate="none", skip_epochs=0, cells=1), 3, keep_last=True)
    assert found.grids == {"a": (1, 1)}
    maps = torch.tensor([-1.0, 2.0, 0.0, 1.0]).view(1, K, 1, 1)
    assert found.update(maps, torch.zeros(1, K), torch.tensor([[0.0, 1, 0, 0]]), ["a"], [WHOLE], 0) == 1
    last = found.last("a", 2)
    assert last is not None
    assert last.tolist() == [[255]]


def test_images_without_tags_hold_nothing() -> None:
    found = AttentionAccumulator([Image("a", Path(), 40, 60, (), None, None)], ALL, 2)
    assert found.share_seen() == 0
    assert found.mean_attention() == 0


@pytest.mark.parametrize("keep_last", [False, True])
def test_a_crop_whose_map_has_the_size_of_the_grid_is_put_in_its_place(tmp_path: Path, keep_last: bool) -> None:
    """A map of 4 x 6 over the right half is no map of 4 x 6 over the image."""
    found = accumulator(keep_last=keep_last)
    feed(found, np.ones(GRID), window=Window(0, 0.5, 1, 1))
    expected = np.zeros(GRID)
    expected[:, 3:] = 255
    assert dumped(found, tmp_path).get("img0", 1).tolist() == expected.tolist()


def test_an_image_twice_in_a_batch_passes_the_gate_by_each_of_its_scores() -> None:
    found = accumulator(Accumulate(gate="strict", skip_epochs=0, cells=4))
    maps, tags = torch.ones(2, K, *GRID), torch.tensor([[1.0, 0, 0, 0]] * 2)
    logits = torch.tensor([[-1.0, 0, 0, 0], [1.0, 0, 0, 0]])
    assert found.update(maps, logits, tags, ["img0", "img0"], [WHOLE] * 2, 0) == 1


def test_a_window_is_needed_for_each_image() -> None:
    maps, logits, tags = torch.ones(2, K, *GRID), torch.zeros(2, K), torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 1.0]])
    with pytest.raises(ValueError, match="shorter"):
        accumulator().update(maps, logits, tags, ["img0", "img1"], [WHOLE], 0)


def test_of_many_equal_scores_the_lower_classes_rank_first() -> None:
    """Every third of 80 classes scores 1, more than a sort keeps in order by chance; the first five of them pass."""
    scores = torch.zeros(1, 80)
    scores[0, ::3] = 1
    tags = torch.zeros(1, 80)
    tags[0, [0, 3, 6, 12, 78]] = 1
    assert np.flatnonzero(passes(scores, tags, "top_n")[0]).tolist() == [0, 3, 6, 12]
