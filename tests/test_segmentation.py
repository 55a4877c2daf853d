"""How segmentation networks are trained: losses in NumPy and by hand, the papers' rates, the stage's task, params."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config.params import validate
from pipeline.config.registry import SEGMENTATIONS, Choice
from pipeline.config.schema import Backbone, Segmentation, Training
from pipeline.data.geometry import Window
from pipeline.data.loading import Batch
from pipeline.errors import PipelineError
from pipeline.networks.segmentation import SegmentationNetwork, build_segmentation
from pipeline.training.loop import extent
from pipeline.training.segmentation import cross_entropy, own_prediction, reduced, segmentation_loss
from pipeline.training.settings import build_optimizer, learning_rate, parameter_groups
from stages.segmentation import SegmentationTask
from tests.networks import on_meta, resize
from tests.voc_tree import make_tree, minimal_params

Array = NDArray[np.float64]
SIZES = [(5, 7), (4, 5), (3, 4), (5, 7)]  # of the logits: 1x, two scales, the maximum
K = 3


def entropy(logits: Array, labels: NDArray[np.int64]) -> float:
    """The mean of -log softmax at the labels that are not 255; 0 where all are."""
    shifted = logits - logits.max(1, keepdims=True)
    chances = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    sample, row, column = np.nonzero(labels != 255)
    found = -chances[sample, labels[sample, row, column], row, column]
    return float(found.mean()) if len(found) else 0.0


def nearest(labels: NDArray[np.int64], height: int, width: int) -> NDArray[np.int64]:
    """The label that lies under the centre of each new pixel."""
    rows, columns = (
        [int((n + 0.5) * before / after) for n in range(after)]
        for before, after in ((labels.shape[1], height), (labels.shape[2], width))
    )
    return labels[:, rows][:, :, columns]


@pytest.fixture
def supervised() -> list[Tensor]:
    torch.manual_seed(0)
    return [3 * torch.randn(2, K + 1, height, width) for height, width in SIZES]


@pytest.fixture
def labels() -> Tensor:
    found = torch.randint(0, K + 1, (2, 33, 50), generator=torch.Generator().manual_seed(1))
    found[:, :6] = 255
    return found


TAGS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])


class TestLoss:
    def test_four_terms_at_the_size_of_the_labels(self, supervised: list[Tensor], labels: Tensor) -> None:
        wanted = [entropy(resize(logits.double().numpy(), 33, 50), labels.numpy()) for logits in supervised]
        assert float(segmentation_loss(supervised, labels, TAGS)) == pytest.approx(sum(wanted), rel=1e-5)

    def test_four_terms_at_each_size_of_the_logits(self, supervised: list[Tensor], labels: Tensor) -> None:
        wanted = [
            entropy(logits.double().numpy(), nearest(labels.numpy(), *size))
            for logits, size in zip(supervised, SIZES, strict=True)
        ]
        found = segmentation_loss(supervised, labels, TAGS, "output")
        assert float(found) == pytest.approx(sum(wanted), rel=1e-5)
        assert len(set(wanted)) == 4

    @pytest.mark.parametrize("loss_size", ["input", "output"])
    def test_self_training_adds_a_term_of_the_own_answer(
        self, supervised: list[Tensor], labels: Tensor, loss_size: Any
    ) -> None:
        """At every pixel, also where the label is 255, of each map as it is compared with the labels."""
        wanted = 0.0
        for logits in supervised:
            scores = logits.double().numpy()
            if loss_size == "input":
                scores = resize(scores, 33, 50)
            answer = np.empty(scores[:, 0].shape, np.int64)
            for sample, present in enumerate([(0, 1, 3), (0, 2)]):
                answer[sample] = np.array(present)[scores[sample, present].argmax(0)]
            wanted += entropy(scores, answer)
        plain = segmentation_loss(supervised, labels, TAGS, loss_size)
        found = segmentation_loss(supervised, labels, TAGS, loss_size, self_training=True)
        assert float(found - plain) == pytest.approx(wanted, rel=1e-5)

    @pytest.mark.parametrize("loss_size", ["input", "output"])
    def test_without_a_label_it_is_0_with_gradients_of_0(self, supervised: list[Tensor], loss_size: Any) -> None:
        logits = [found.requires_grad_() for found in supervised]
        loss = segmentation_loss(logits, torch.full((2, 33, 50), 255), TAGS, loss_size)
        loss.backward()  # type: ignore[no-untyped-call]
        assert float(loss.detach()) == 0
        assert all(found.grad is not None and not found.grad.any() for found in logits)

    def test_ignored_pixels_have_no_part(self) -> None:
        logits = torch.randn(1, 2, 1, 3)
        some = cross_entropy(logits, torch.tensor([[[0, 255, 1]]]))
        torch.testing.assert_close(some, cross_entropy(logits[..., [0, 2]], torch.tensor([[[0, 1]]])))

    def test_labels_are_reduced_to_those_under_the_centres(self) -> None:
        """321 -> 41 as in the papers, and odd and even factors."""
        for before, after in [(321, 41), (9, 3), (8, 4), (40, 12), (7, 7)]:
            labels = torch.arange(before).expand(1, before, before)
            assert np.array_equal(reduced(labels, (after, after)).numpy(), nearest(labels.numpy(), after, after))
        assert reduced(torch.arange(9).expand(1, 9, 9), (3, 9))[0, 0].tolist() == list(range(9))
        assert reduced(torch.arange(9).expand(1, 9, 9), (3, 3))[0, 0].tolist() == [1, 4, 7]


class TestOwnAnswer:
    """Three classes and background; classes 1 and 3 are tagged."""

    LOGITS = torch.tensor(
        [
            [2.0, 1.0, 9.0, 0.0],  # class 2 is best, but absent: background
            [-3.0, -1.0, 5.0, -2.0],  # all present ones negative: class 1, where multiplying with 0 gave class 2
            [-3.0, -4.0, -1.0, -2.0],  # all negative: class 3
            [0.0, 1.0, 2.0, 3.0],  # class 3
        ]
    ).T[None, :, None]
    TAGS = torch.tensor([[1.0, 0.0, 1.0]])

    def test_it_is_the_best_of_background_and_tags(self) -> None:
        assert own_prediction(self.LOGITS, self.TAGS).tolist() == [[[0, 1, 3, 3]]]

    def test_without_tags_all_is_background(self) -> None:
        assert own_prediction(self.LOGITS, torch.zeros(1, 3)).tolist() == [[[0, 0, 0, 0]]]

    def test_the_term_by_hand(self) -> None:
        """Only the first two pixels are labelled; the term is of all four."""
        labels = torch.tensor([[[1, 2, 255, 255]]])
        chances = self.LOGITS[0, :, 0].T.softmax(1)
        plain = -(chances[0, 1].log() + chances[1, 2].log()) / 2
        own = -sum(chances[n, answer].log() for n, answer in enumerate((0, 1, 3, 3))) / 4
        found = segmentation_loss([self.LOGITS], labels, self.TAGS, self_training=True)
        torch.testing.assert_close(found, plain + own)

    def test_it_sharpens_the_answer_and_nothing_flows_through_it(self) -> None:
        logits = self.LOGITS.clone().requires_grad_()
        ignored = torch.full((1, 1, 4), 255)
        segmentation_loss([logits], ignored, self.TAGS, "output", self_training=True).backward()  # type: ignore[no-untyped-call]
        answer = F.one_hot(own_prediction(self.LOGITS, self.TAGS), 4).movedim(-1, 1)
        torch.testing.assert_close(logits.grad, (self.LOGITS.softmax(1) - answer) / 4)


def network(name: str, settings: dict[str, Any], **others: Any) -> Segmentation:
    return Segmentation("ground_truth", Choice(SEGMENTATIONS, name, settings), **others)


V2 = network(
    "deeplab_v2",
    {"rates": [6, 12, 18, 24], "extra_scales": [0.75, 0.5]},
    backbone=Backbone("resnet101", weights=None, frozen_batch_norm=True),
    loss_size="output",
    training=Training(
        5, 2.5e-4, iterations=20_000, accumulation=2, decay_biases=False, schedule="poly", power=0.9, hold=10
    ),
)
LARGE_FOV = network(
    "deeplab_largefov",
    {},
    backbone=Backbone("vgg16"),
    training=Training(10, 1e-3, iterations=20_000, decay_biases=False, schedule="poly"),
)
NEAR: dict[str, dict[str, Any]] = {  # rates that fit features of a few cells
    "deeplab_largefov": {"rate": 2, "channels": 16, "dropout": 0.0},
    "deeplab_v2": {"rates": [1, 2]},
    "deeplab_v3plus": {"rates": [1, 2, 3], "channels": 16, "dropout": 0.0},
}


class TestPublished:
    """The figures of deeplab-pytorch (DeepLab-v2) and of OAA's and the PyTorch LargeFOV, by name of the parameters."""

    def groups(self, settings: Segmentation) -> dict[str, tuple[Any, Any, Any]]:
        """Rate at the start, weight decay and momentum of each parameter that learns."""
        made: SegmentationNetwork = on_meta(lambda: build_segmentation(settings, 20))
        names = {id(parameter): name for name, parameter in made.named_parameters()}
        training = settings.training
        optimizer = build_optimizer(parameter_groups(made, [made.head], training), training)
        rate = learning_rate(training, 0, 1, 20_000)
        return {
            names[id(parameter)]: (rate * group["multiplier"], group["weight_decay"], group["momentum"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    def test_groups_of_deeplab_v2(self) -> None:
        found = self.groups(V2)
        head = {name: values for name, values in found.items() if name.startswith("head.")}
        assert head == {
            **{f"head.branches.{n}.weight": pytest.approx((2.5e-3, 5e-4, 0.9)) for n in range(4)},
            **{f"head.branches.{n}.bias": pytest.approx((5e-3, 0.0, 0.9)) for n in range(4)},
        }
        made = on_meta(lambda: build_segmentation(V2, 20))
        convs = {
            f"{name}.weight"
            for name, module in made.backbone.named_modules(prefix="backbone")
            if isinstance(module, nn.Conv2d)
        }
        assert found.keys() - head.keys() == convs  # no batch norm among them
        assert len(convs) == 104
        assert all(found[name] == pytest.approx((2.5e-4, 5e-4, 0.9)) for name in convs)

    def test_groups_of_large_fov(self) -> None:
        found = self.groups(LARGE_FOV)
        assert len(found) == 2 * 13 + 6
        for name, values in found.items():
            new, bias = name.startswith("head."), name.endswith("bias")
            rate = 1e-3 * (10 if new else 1) * (2 if bias else 1)
            assert values == pytest.approx((rate, 0.0 if bias else 5e-4, 0.9)), name

    def test_rates_of_deeplab_v2(self) -> None:
        """Poly over 20,000 optimizer steps of 10 images; steps 0 to 9 share a rate, 10 to 19 the next."""
        training = V2.training
        assert training.batch_size * training.accumulation == 10
        steps = extent(training, 10_582).steps
        assert steps == 20_000
        rates = [learning_rate(training, step, 1_059, steps) for step in range(steps)]
        for step in (0, 9, 10, 19, 20, 9_999, 10_000, 19_989, 19_990, 19_999):
            assert rates[step] == pytest.approx(2.5e-4 * (1 - step // 10 * 10 / 20_000) ** 0.9)
        assert len(set(rates)) == 2_000

    def test_rates_of_large_fov(self) -> None:
        rates = [learning_rate(LARGE_FOV.training, step, 1_059, 20_000) for step in (0, 1, 10_000)]
        assert rates == pytest.approx([1e-3, 1e-3 * (1 - 1 / 20_000) ** 0.9, 1e-3 * 0.5**0.9])


def batch(labels: Tensor) -> Batch:
    images = torch.randn(len(labels), 3, *labels.shape[1:], generator=torch.Generator().manual_seed(0))
    return Batch(images, TAGS, ["a", "b"], [Window()] * 2, labels)


class TestTask:
    @pytest.mark.parametrize("loss_size", ["input", "output"])
    @pytest.mark.parametrize("self_training", [False, True])
    def test_loss_follows_the_settings(self, labels: Tensor, loss_size: Any, self_training: bool) -> None:
        torch.manual_seed(0)
        settings = network(
            "deeplab_v2",
            {"rates": [1, 2], "extra_scales": [0.75, 0.5]},
            backbone=Backbone("small"),
            training=Training(2, 0.1, epochs=1),
            loss_size=loss_size,
            self_training=self_training,
        )
        made = build_segmentation(settings, K).eval()
        task = SegmentationTask(made, settings)
        assert list(task.new_layers()) == [made.head]
        with torch.no_grad():
            supervised = made.supervised(batch(labels).images)
            wanted = segmentation_loss(supervised, labels, TAGS, loss_size, self_training)
            assert torch.equal(task.loss(batch(labels), 0), wanted)
        assert len(supervised) == 4

    @pytest.mark.parametrize("name", SEGMENTATIONS.names())
    def test_steps_lower_the_loss(self, labels: Tensor, name: Any) -> None:
        torch.manual_seed(0)
        training = Training(2, 0.02, epochs=1, lr_new=1.0)
        settings = network(name, NEAR[name], backbone=Backbone("small"), training=training)
        task = SegmentationTask(build_segmentation(settings, K), settings)
        optimizer = build_optimizer(parameter_groups(task.network, task.new_layers(), training), training)
        blocks = labels[:, ::17, ::25].repeat_interleave(17, 1)[:, :33].repeat_interleave(25, 2)
        losses = []
        for _ in range(10):
            loss = task.loss(batch(blocks), 0)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.8 * losses[0]


class TestParams:
    @pytest.mark.parametrize(
        ("network", "faults"),
        [
            ({"deeplab_largefov": {"rates": [6]}}, ["rates: unknown key; did you mean rate?"]),
            (
                {"deeplab_largefov": {"rate": 0, "dropout": 2}},
                ["rate: 0 must be at least 1", "dropout: 2.0 must be at least 0 and at most 1"],
            ),
            ({"deeplab_v3plus": {"rates": [6]}}, ["rates: must be a list of 3 values, not [6]"]),
            ({"deeplab_v2": {"rates": []}}, ["rates: is empty; state one dilation for each parallel convolution"]),
            (
                {"deeplab_v2": {"rates": [6, 0, -1]}},
                ["rates[1]: 0 must be at least 1", "rates[2]: -1 must be at least 1"],
            ),
            ({"deeplab_v2": {"extra_scales": [0.5, 0]}}, ["extra_scales[1]: 0.0 must be at least 0.05 and at most 10"]),
        ],
    )
    def test_a_fault_is_one_line_that_names_the_key(
        self, network: dict[str, Any], faults: list[str], tmp_path: Path
    ) -> None:
        raw = minimal_params(make_tree(tmp_path))
        raw["segmentations"]["cam"]["network"] = network
        with pytest.raises(PipelineError) as caught:
            validate(raw, "p.yaml", resolve=True)
        (name,) = network
        assert caught.value.lines == tuple(f"p.yaml: segmentations.cam.network.{name}.{fault}" for fault in faults)

    def test_faults_of_all_networks_are_reported_at_once(self, tmp_path: Path) -> None:
        raw = minimal_params(make_tree(tmp_path))
        for row, rate in (("cam", 0), ("other", -1)):
            raw["segmentations"][row] = raw["segmentations"]["cam"] | {"network": {"deeplab_largefov": {"rate": rate}}}
        with pytest.raises(PipelineError) as caught:
            validate(raw, "p.yaml", resolve=True)
        assert [line.split(": ")[1] for line in caught.value.lines] == [
            "segmentations.cam.network.deeplab_largefov.rate",
            "segmentations.other.network.deeplab_largefov.rate",
        ]

    def test_scales_reach_the_network(self, tmp_path: Path) -> None:
        raw = minimal_params(make_tree(tmp_path))
        raw["segmentations"]["cam"]["network"] = {"deeplab_v2": {"extra_scales": [0.75, 0.5]}}
        settings = validate(raw).segmentations["cam"]
        assert build_segmentation(settings, K).head.extra_scales == (0.75, 0.5)
