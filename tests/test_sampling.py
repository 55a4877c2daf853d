"""The order of the training images: each once per epoch, grouped by class on request."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.config.schema import Augmentation, Training
from pipeline.data.index import Index
from pipeline.data.loader import Batches, load
from pipeline.data.loading import Batch, TrainingSet
from pipeline.data.sampling import epoch_order
from pipeline.data.streams import Purpose, rng
from pipeline.runtime import Runtime
from pipeline.training.loop import Loop, Stateless
from tests.voc_tree import make_index

Tags = list[tuple[int, ...]]


def many(images: int, classes: int, seed: int = 0) -> Tags:
    """Random tags, one to three per image."""
    random = np.random.default_rng(seed)
    counts = random.integers(1, min(classes, 3) + 1, images).tolist()
    return [tuple(sorted((random.choice(classes, count, replace=False) + 1).tolist())) for count in counts]


def groups(order: list[int], group: int) -> list[list[int]]:
    return [order[i : i + group] for i in range(0, len(order) - len(order) % group, group)]


def shared(tags: Tags, members: list[int]) -> set[int]:
    return set.intersection(*(set(tags[number]) for number in members))


@pytest.mark.parametrize("epoch", [0, 3])
def test_a_group_of_one_is_the_plain_shuffle(epoch: int) -> None:
    expected = rng(7, Purpose.ORDER, epoch).permutation(50).tolist()
    assert epoch_order(many(50, 4), 1, 7, epoch).tolist() == expected


@pytest.mark.parametrize("group", [2, 3, 4])
@pytest.mark.parametrize(("images", "classes"), [(400, 20), (41, 3), (7, 5), (3, 1), (1, 1), (0, 1)])
def test_groups_share_a_class_until_no_class_has_images_left(images: int, classes: int, group: int) -> None:
    tags = many(images, classes, seed=images)
    order = epoch_order(tags, group, 0, 0).tolist()
    assert sorted(order) == list(range(images))
    unlike = [members for members in groups(order, group) if not shared(tags, members)]
    left = [number for members in unlike for number in members] + order[images - images % group :]
    counts = Counter(tag for number in left for tag in tags[number])
    # Groups formed at random may share a class by chance, so their images count as left over as well.
    assert all(count < group for count in counts.values())
    assert len(left) <= classes * (group - 1)


def test_by_hand() -> None:
    """Two cats, two dogs, a bird and a cow form three groups for any seed: two share a class."""
    tags: Tags = [(1,), (2,), (1,), (2,), (3,), (4,)]
    for seed in range(20):
        found = {frozenset(members) for members in groups(epoch_order(tags, 2, seed, 0).tolist(), 2)}
        assert found == {frozenset((0, 2)), frozenset((1, 3)), frozenset((4, 5))}


def test_an_image_that_fills_no_group_comes_last() -> None:
    tags: Tags = [(1,), (1,), (2,), (1,), (1,)]
    assert {int(epoch_order(tags, 2, seed, 0)[-1]) for seed in range(20)} == {2}


def plainly(tags: Tags, group: int, seed: int, epoch: int) -> list[int]:
    """Reference implementation that searches all images for every group."""
    random = rng(seed, Purpose.ORDER, epoch)
    order = random.permutation(len(tags)).tolist()
    left, found = list(order), []
    for number in order:
        for tag in random.permutation(tags[number]).tolist() if number in left else ():
            members = [other for other in left if tag in tags[other]][:group]
            if len(members) == group:
                found.append(members)
                left = [other for other in left if other not in members]
                break
    found += groups(left, group)
    found = [found[place] for place in random.permutation(len(found))]
    return [number for members in found for number in members] + left[len(left) - len(left) % group :]


@pytest.mark.parametrize("group", [2, 3, 4])
@pytest.mark.parametrize(("images", "classes"), [(150, 20), (60, 3), (25, 9), (9, 5), (1, 1)])
def test_the_order_equals_the_reference(images: int, classes: int, group: int) -> None:
    for epoch in range(4):
        tags = many(images, classes, seed=epoch)
        assert epoch_order(tags, group, 7, epoch).tolist() == plainly(tags, group, 7, epoch)


def test_class_sharing_and_random_groups_are_shuffled() -> None:
    """Of 20 class-sharing and 20 random pairs, half of the class-sharing ones are in the first half of an epoch."""
    tags: Tags = [(1,)] * 40 + [(tag,) for tag in range(2, 42)]
    first = []
    for epoch in range(50):
        alike = [bool(shared(tags, pair)) for pair in groups(epoch_order(tags, 2, 0, epoch).tolist(), 2)]
        assert sum(alike) == 20
        first.append(sum(alike[:20]))
    assert 9 < np.mean(first) < 11
    assert len(set(first)) > 3


def test_untagged_images_are_grouped_at_random() -> None:
    order = epoch_order([()] * 5, 2, 0, 0).tolist()
    assert sorted(order) == list(range(5))


def test_the_order_depends_on_seed_and_epoch() -> None:
    tags = many(60, 5)
    first = epoch_order(tags, 2, 0, 0).tolist()
    assert epoch_order(tags, 2, 0, 0).tolist() == first
    assert epoch_order(tags, 2, 0, 1).tolist() != first
    assert epoch_order(tags, 2, 1, 0).tolist() != first
    partners = {frozenset(members) for members in groups(first, 2)}
    again = {frozenset(members) for members in groups(epoch_order(tags, 2, 0, 1).tolist(), 2)}
    assert len(partners & again) < 10  # different partners, not only a different order


def test_every_class_of_an_image_forms_groups() -> None:
    """Image 0 has both tags; over the epochs each tag pairs it with other images."""
    tags: Tags = [(1, 2), *[(1,)] * 9, *[(2,)] * 10]
    found: Counter[int] = Counter()
    for epoch in range(200):
        pair = next(members for members in groups(epoch_order(tags, 2, 0, epoch).tolist(), 2) if 0 in members)
        found.update(shared(tags, pair) if len(shared(tags, pair)) == 1 else [])
    assert min(found[1], found[2]) > 60


# --- in batches -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Nine training images of three classes; four or five images have each tag."""
    return Index(make_index(tmp_path_factory.mktemp("tree"), train=9))


def dataset(index: Index, group: int) -> TrainingSet:
    return TrainingSet(index.images("train"), 3, Augmentation(crop=16), 5, group=group)


def test_groups_stay_in_one_batch(index: Index) -> None:
    grouped = dataset(index, 2)
    for epoch in range(5):
        batches = list(load(grouped, 4, [epoch]))
        assert [len(batch.ids) for batch in batches] == [4, 4, 1]
        pairs = [batch.tags[i : i + 2] for batch in batches[:2] for i in (0, 2)]
        assert sum(bool(pair.prod(0).any()) for pair in pairs) >= 3
    plain = rng(5, Purpose.ORDER).permutation(9).tolist()
    assert [number for batch in Batches(dataset(index, 1), 4, 0) for _, number in batch] == plain


def test_an_epoch_resumes_at_a_batch(index: Index) -> None:
    grouped = dataset(index, 2)
    whole = Batches(grouped, 2, 3).batches
    assert Batches(grouped, 2, 3, start=2).batches == whole[2:]


class PairTask(Stateless):
    """Records the tags of its batches."""

    def __init__(self) -> None:
        self.network = nn.Conv2d(3, 3, 1)
        self.seen: list[Tensor] = []

    def new_layers(self) -> list[nn.Module]:
        return []

    def loss(self, batch: Batch, epoch: int) -> Tensor:
        self.seen.append(batch.tags)
        return self.network(batch.images).square().mean()


def test_the_training_loop_gets_the_pairs(index: Index, tmp_path: Path) -> None:
    task = PairTask()
    settings = Training(2, 1e-3, epochs=2, precision="fp32")
    Loop(task, dataset(index, 2), settings, torch.device("cpu"), runtime=Runtime(), path=tmp_path / "state").run()
    alike = [bool(tags.prod(0).any()) for tags in task.seen if len(tags) == 2]
    assert len(task.seen) == 10
    assert sum(alike) >= 6
