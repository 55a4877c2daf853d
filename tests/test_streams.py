"""Random streams: one per seed, purpose, epoch and number, and no other generator in the pipeline."""

import ast
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.schema import Accumulate, AttentionDrop, Augmentation
from pipeline.data.index import Index
from pipeline.data.loading import TrainingSet
from pipeline.data.sampling import epoch_order
from pipeline.data.streams import Purpose, chosen, rng
from pipeline.methods.attention_drop import AttentionDropLayer
from pipeline.methods.oaa import AttentionAccumulator
from tests.voc_tree import make_index

ROOT = Path(__file__).parent.parent


def test_a_key_reproduces_its_stream() -> None:
    for purpose in Purpose:
        assert rng(3, purpose, 2, 1).random(5).tolist() == rng(3, purpose, 2, 1).random(5).tolist()
    assert rng(3, Purpose.ORDER).random() == rng(3, Purpose.ORDER, 0, 0).random()


def test_no_two_keys_share_a_stream() -> None:
    """Streams differ even if a seed above 32 bits contains another key's numbers, or if a part of the key is 0."""
    seeds = [0, 1, 2, 2**32, 2**32 + 1, 2**64 + 2**32]
    keys = list(product(seeds, Purpose, range(3), range(3)))
    assert len({tuple(rng(*key).integers(0, 2**63, 2).tolist()) for key in keys}) == len(keys)


def test_streams_are_uncorrelated() -> None:
    """No two of 3 x purposes x 3 x 3 streams of 4,000 numbers correlate beyond chance (5.5 sigma)."""
    draws = np.stack([rng(*key).random(4000) for key in product(range(3), Purpose, range(3), range(3))])
    correlation = np.corrcoef(draws)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5.5 / 4000**0.5


def test_the_first_draws_of_neighbours_are_uncorrelated() -> None:
    """The first draw decides a flip or occlusion; it must not correlate across purposes, epochs or seeds."""
    draws = np.stack(
        [[rng(*key, number).random() for number in range(2000)] for key in product(range(2), Purpose, range(2))]
    )
    correlation = np.corrcoef(draws)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5.5 / 2000**0.5
    assert np.abs([np.corrcoef(row[:-1], row[1:])[0, 1] for row in draws]).max() < 5.5 / 2000**0.5


@pytest.mark.parametrize("key", [(-1, 0, 0), (0, -1, 0), (0, 0, -1)])
def test_negative_keys_are_refused(key: tuple[int, int, int]) -> None:
    seed, epoch, number = key
    with pytest.raises(ValueError, match="non-negative"):
        rng(seed, Purpose.ORDER, epoch, number)


def test_a_purpose_must_not_be_an_integer() -> None:
    """An integer must not be accepted, since swapped arguments would select another purpose's stream."""
    with pytest.raises(AttributeError):
        rng(0, 1, 2)  # type: ignore[arg-type]


# --- independence of draws -------------------------------------------------------------------------------------------


def test_an_image_is_occluded_whether_or_not_it_is_flipped(tmp_path: Path) -> None:
    """With a shared stream, the same draw would decide both the occlusion and the flip."""
    images = Index(make_index(tmp_path, train=7)).images("train")
    dataset = TrainingSet(images, 3, Augmentation(), 5)
    accumulator = AttentionAccumulator(images, Accumulate(gate="none", skip_epochs=0, cells=4), 2, keep_last=True)
    for block in accumulator._blocks.values():
        block.last[:], block.has_last[:] = 255, True
    layer = AttentionDropLayer(AttentionDrop(beta=0.5), accumulator, 5)
    both = []
    for epoch, number in product(range(80), range(len(images))):
        item = dataset[epoch, number]
        window = item.sample.window
        both.append(
            (
                window.flip,
                bool(layer.mask([item.id], item.tags[None], [window], (4, 6), epoch, torch.device("cpu")).any()),
            )
        )
    flipped, occluded = np.array(both).T
    assert 0.4 < flipped.mean() < 0.6
    assert 0.4 < occluded.mean() < 0.6
    assert abs(np.corrcoef(flipped, occluded)[0, 1]) < 4 / len(both) ** 0.5


@pytest.mark.parametrize("purpose", [Purpose.MIXTURE, Purpose.SHARE])
def test_a_choice_of_images_is_independent_of_the_order(purpose: Purpose) -> None:
    """The order of the first epoch must not determine which images use their masks, or are trained on at all."""
    shared = []
    for seed in range(40):
        first = epoch_order([(1,)] * 100, 1, seed, 0)[:50].tolist()
        shared.append(len(chosen([str(n) for n in range(100)], 50, seed, purpose) & {str(n) for n in first}))
    assert 22 < np.mean(shared) < 28


def generators(source: str) -> list[str]:
    """Find where source code creates or seeds a NumPy or Python generator, however it is imported."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name in ("random", "numpy.random")]
        elif isinstance(node, ast.ImportFrom):
            names = {name.name for name in node.names}
            if node.module in ("random", "numpy.random") or (node.module == "numpy" and "random" in names):
                found.append(str(node.module))
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("np.random", "numpy.random"):
            found += [ast.unparse(node)] if node.attr != "Generator" else []
    return found


@pytest.mark.parametrize(
    "source",
    [
        "np.random.default_rng(0)",
        "numpy.random.RandomState(0)",
        "np.random.seed(0)",
        "import random",
        "from random import shuffle",
        "from numpy.random import default_rng",
        "from numpy import random",
        "import numpy.random as draw",
    ],
)
def test_a_generator_is_found_however_it_is_imported(source: str) -> None:
    assert len(generators(source)) == 1
    assert not generators(
        "import numpy as np\ndef f(random: np.random.Generator) -> float:\n    return random.random()"
    )


def test_every_generator_of_the_pipeline_is_one_of_these_streams() -> None:
    """Exception: the demo, whose images are data with their own seed; all recorded scores depend on their bytes."""
    files = [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "stages").rglob("*.py")]
    found = {str(path.relative_to(ROOT)): generators(path.read_text()) for path in files}
    assert len(files) > 80
    assert {path: names for path, names in found.items() if names} == {
        "pipeline/data/streams.py": ["np.random.default_rng", "np.random.SeedSequence"],
        "pipeline/data/demo.py": ["np.random.default_rng"],
    }
