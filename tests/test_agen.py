"""AGEN: its modules and its joint loss against the paper's formulas in NumPy and float64, and what can be switched."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.config.registry import ONE_STEP, Choice, plain
from pipeline.config.schema import Backbone, Head, OneStep, Training
from pipeline.errors import PipelineError
from pipeline.methods.agen import FINAL, Agen, ContextAttention
from pipeline.methods.agen_losses import BoundaryLoss
from pipeline.training import models
from pipeline.training.settings import build_optimizer, parameter_groups
from tests.method_contract import Arithmetic, Array
from tests.networks import on_meta, randomise_batch_norms, resize, size
from tests.test_agen_losses import FEW, SIZE, TAGS, K, labelled, padded_images, seeded, softmax


def settings(
    one: Any = "small", other: Any = "small", shared: tuple[str, str] = ("conv2", "conv2"), **more: Any
) -> OneStep:
    """A block with two backbones, by name or as such."""
    small = {"head": Head(1, 16), "channels": 16, "rate": 2, "agm_channels": (8, 12), "grid": 7, "crf": FEW, **more}
    return block_of(one, other, shared=shared, **small)


def block_of(one: Any, other: Any, **own: Any) -> OneStep:
    """A block with AGEN's own settings, defaults elsewhere."""
    backbones = zip(("classification", "segmentation"), (one, other), strict=True)
    bodies = {key: Backbone(body) if isinstance(body, str) else body for key, body in backbones}
    return OneStep(Choice(ONE_STEP, "agen", plain(own)), bodies, Training(2, 0.02, epochs=1, lr_new=1.0))


def network(*names: Any, **more: Any) -> Agen:
    """With weights that say something, and lambdas that are not 0."""
    torch.manual_seed(0)
    made = Agen(settings(*names, **more), K).eval()
    randomise_batch_norms(made)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
        elif name.endswith(("scores.weight", "classifier.weight", "masks.2.weight")):
            parameter.data.normal_(std=0.3)
    for number, module in enumerate(made.coam.values()):
        module.get_parameter("weight").data.fill_(0.5 + number)
    return made


@pytest.fixture
def images() -> Tensor:
    return padded_images()


@pytest.fixture
def tags() -> Tensor:
    return TAGS


def context(lower: Array, upper: Array, weight: float) -> Array:
    """Eq. 6 to 9, pixel by pixel."""
    upper = resize(upper, *lower.shape[2:])
    out = np.empty_like(lower)
    for f, u, o in zip(lower, upper, out, strict=True):
        f, u = f.reshape(len(f), -1), u.reshape(len(u), -1)
        found = np.zeros_like(f)
        for i in range(f.shape[1]):
            a = softmax(f[:, i] @ u, 0)
            found[:, i] = (a * f).sum(1)
        o[:] = (weight * found + f).reshape(o.shape)
    return out


class TestContextAttention:
    @pytest.mark.parametrize("channels", [5, 8, 20])
    def test_it_is_its_formula(self, channels: int) -> None:
        torch.manual_seed(0)
        module = ContextAttention()
        module.weight.data.fill_(0.7)
        lower, upper = torch.randn(2, channels, 6, 9), torch.randn(2, channels, 3, 5)
        wanted = context(lower.double().numpy(), upper.double().numpy(), module.weight.item())
        found = module(lower, upper).detach().numpy()
        assert np.abs(found - wanted).max() < 1e-5
        assert np.abs(wanted - lower.numpy()).max() > 0.3

    def test_it_starts_as_the_identity_and_learns(self) -> None:
        module = ContextAttention()
        lower = torch.randn(2, 4, 5, 5)
        out = module(lower, torch.randn(2, 4, 3, 3))
        assert torch.equal(out, lower)
        out.square().sum().backward()
        assert module.weight.grad is not None
        assert module.weight.grad != 0

    def test_scores_beyond_bf16_are_taken_in_float32(self) -> None:
        """Under autocast too: products of large scores that bf16 could not tell apart decide the softmax."""
        torch.manual_seed(0)
        module = ContextAttention()
        module.weight.data.fill_(1.0)
        lower, upper = 12 * torch.randn(1, 4, 4, 4), 12 * torch.randn(1, 4, 4, 4)
        with torch.autocast("cpu", torch.bfloat16):
            found = module(lower, upper)
        wanted = context(lower.double().numpy(), upper.double().numpy(), 1.0)
        assert np.abs(found.detach().numpy() - wanted).max() < 1e-3

    def test_no_matrix_of_all_pairs_is_kept(self) -> None:
        pixels = 40 * 40
        kept: list[int] = []

        def keep(x: Tensor) -> Tensor:
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            ContextAttention()(torch.randn(1, 20, 40, 40, requires_grad=True), torch.randn(1, 20, 20, 20))
        assert kept
        assert max(kept) < pixels * 25


class TestAgen:
    """The network on two light backbones, in NumPy."""

    def forward(self, made: Agen, images: Array) -> tuple[dict[int, Array], dict[int, Array]]:
        """Class-aware maps and segmentation logits by stage, of all AGMs and CoAMs (Fig. 1 and 2)."""
        w = {name: value.double().numpy() for name, value in made.state_dict().items()}
        conv = Arithmetic.conv

        def taps(merged: dict[str, Array]) -> list[Array]:
            found: list[Array] = []

            def note(number: int, x: Array) -> Array:
                if number % 2:
                    found.append(x)
                return x

            Arithmetic.small_backbone(merged, images, note)
            return found

        a = {name.replace("classification.", "backbone."): value for name, value in w.items()}
        own = {
            name.replace("segmentation.", "backbone."): value for name, value in w.items() if "segmentation." in name
        }
        features_a, features_b = taps(a), taps({**a, **own})

        def layer(x: Array, name: str, padding: int = 1, relu: bool = True) -> Array:
            out = conv(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=padding)
            return np.maximum(out, 0) if relu else out

        def guide(branch: int, stage: int, x: Array) -> Array:
            x = layer(layer(x, f"guides.{branch}.own.{stage}"), f"guides.{branch}.shared")
            return layer(x, f"guides.{branch}.scores", 0, relu=False)

        maps = {FINAL: layer(layer(features_a[2], "head.convs.0"), "head.classifier", 0, relu=False)}
        for stage in (5, 4, 3):
            maps[stage] = context(
                guide(0, stage, features_a[stage - 3]), maps[stage + 1], float(w[f"coam.{stage}.weight"])
            )
        wide = np.zeros((16, 128, 5, 5))
        wide[:, :, ::2, ::2] = w["masks.0.weight"]
        masks = {stage: guide(1, stage, features_b[stage - 3]) for stage in (3, 4, 5)}
        masks[FINAL] = layer(
            np.maximum(conv(features_b[2], wide, w["masks.0.bias"], padding=2), 0), "masks.2", 0, False
        )
        return maps, masks

    @pytest.mark.parametrize("loss_size", ["input", "output"])
    def test_the_losses_are_their_formulas(self, images: Tensor, tags: Tensor, loss_size: Any) -> None:
        made = network(loss_size=loss_size, delta=(0.2, 0.3, 0.4, 0.25), background_power=2.0, boundary_weight=0.5)
        maps, masks = self.forward(made, images.double().numpy())
        with torch.no_grad():
            found = made.losses(images, tags, 0)
            logits = made(images)
        assert np.abs(logits.numpy() - masks[FINAL]).max() < 1e-4 * np.abs(masks[FINAL]).max()
        target, classified, segmented = tags.numpy(), 0.0, 0.0
        for stage, delta in zip((3, 4, 5, FINAL), (0.2, 0.3, 0.4, 0.25), strict=True):
            p = 1 / (1 + np.exp(-maps[stage].mean((2, 3))))
            classified -= (target * np.log(p) + (1 - target) * np.log(1 - p)).mean()
            out = SIZE if loss_size == "input" else masks[stage].shape[2:]
            labels = labelled(maps[stage], target, out, delta, 2.0, "value")
            labels[1, :, (np.arange(out[1]) + 0.5) * 40 / out[1] > 30] = 255  # the padding
            segmented += seeded(resize(masks[stage], *out), labels)
        assert found["classification"].item() == pytest.approx(classified, rel=1e-4)
        assert found["segmentation"].item() == pytest.approx(segmented, rel=2e-3)
        boundary = BoundaryLoss(logits, images, 7, FEW, map).value()
        assert found["boundary"].item() == pytest.approx(0.5 * boundary.item(), rel=1e-5)

    def test_only_branch_b_and_what_it_shares_learn_from_masks(self, images: Tensor, tags: Tensor) -> None:
        made = network()
        losses = made.losses(images, tags, 0)
        (losses["segmentation"] + losses["boundary"]).backward()  # type: ignore[no-untyped-call]
        reached = {name for name, parameter in made.named_parameters() if parameter.grad is not None}
        wanted = ("classification.stages.conv2.", "segmentation.", "guides.1.", "masks.")
        assert reached == {name for name, _ in made.named_parameters() if name.startswith(wanted)}

    def test_a_delay_trains_the_classification_branches_alone(self, images: Tensor, tags: Tensor) -> None:
        made = network(delay=2)
        early, late = made.losses(images, tags, 1), made.losses(images, tags, 2)
        assert early["classification"] == late["classification"]
        assert early["segmentation"] == early["boundary"] == 0
        assert late["segmentation"] > 0
        assert late["boundary"] > 0

    def test_localization_maps_are_probabilities_of_classes(self, images: Tensor) -> None:
        made = network()
        with torch.no_grad():
            found, logits = made.localize(images), made(images)
        assert found.shape == (3, K, 3, 5)
        np.testing.assert_allclose(found.numpy(), softmax(logits.numpy(), 1)[:, 1:], atol=1e-6)

    @pytest.mark.parametrize(
        ("one", "other", "shared", "taps"),
        [
            ("small", "small", ("conv2", "conv2"), (("conv2", "conv4", "conv6"), ("conv2", "conv4", "conv6"))),
            ("vgg16", "resnet38", ("conv2_2", "b2"), (("conv3_3", "conv4_3", "conv5_3"), ("b3", "b4", "b5"))),
            ("mobilenet_v2", "mobilenet_v2", ("stage2", "stage2"), 2 * (("stage3", "stage4", "stage5"),)),
            (
                "mobilenet_v2",
                "small",
                ("stage2", "conv2"),
                (("stage3", "stage4", "stage5"), ("conv2", "conv4", "conv6")),
            ),
        ],
    )
    def test_any_pair_of_backbones(self, one: str, other: str, shared: Any, taps: Any, tags: Tensor) -> None:
        made = Agen(settings(one, other, shared), K)
        assert (tuple(made.taps_a.values()), tuple(made.taps_b.values())) == taps
        widths = (made.classification.taps[shared[0]].channels, made.segmentation.taps[shared[1]].channels)
        assert isinstance(made.adapter, nn.Identity if widths[0] == widths[1] else nn.Conv2d)
        losses = made.losses(torch.randn(2, 3, 33, 40), tags[:2], 0)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        assert [name for name, parameter in made.named_parameters() if parameter.grad is None] == []
        assert made.eval()(torch.randn(1, 3, 33, 40)).shape == (1, K + 1, 5, 5)

    def test_it_is_the_papers(self) -> None:
        published = block_of("vgg16", "resnet38", shared=("conv2_2", "b2"))
        made = on_meta(lambda: Agen(published, 20))
        a, b = 9 * 256, 9 * 512
        branch_c = (256 + 512 + 512) * a + a * 256 + 4 * 256 + 256 * 20 + 20
        branch_d = (256 + 512 + 1024) * b + b * 512 + 4 * 512 + 512 * 21 + 21
        assert [size(branch) for branch in made.guides] == [branch_c, branch_d]
        assert size(made.head) == 9 * 512 * 1024 + 9 * 1024 * 1024 + 2 * 1024 + 1024 * 20 + 20
        assert size(made.adapter) == 0
        assert list(made.segmentation.stages) == ["b3", "b4", "b5", "b6", "b7"]
        assert made(torch.empty(1, 3, 321, 321, device="meta")).shape == (1, 21, 41, 41)

    @pytest.mark.parametrize(
        ("agm", "coam"), [((), ()), ((4,), ()), ((4,), (4,)), ((3, 4, 5), ()), ((3, 4, 5), (5,)), ((5, 3), (3,))]
    )
    def test_modules_can_be_left_out(self, agm: Any, coam: Any, images: Tensor, tags: Tensor) -> None:
        whole, made = network(), network(agm=agm, coam=coam)
        state = {name: value for name, value in whole.state_dict().items() if name in made.state_dict()}
        made.load_state_dict(state)
        with torch.no_grad():
            features = whole.classification.features(images, list(whole.classification.taps))
            found = made.class_maps(features)
            assert list(found) == [FINAL, *sorted(agm, reverse=True)]
            assert torch.equal(found[FINAL], whole.class_maps(features)[FINAL])
            above = found[FINAL]
            for stage in sorted(agm, reverse=True):
                raw = whole.guides[0](stage, features[whole.taps_a[stage]])
                above = whole.coam[str(stage)](raw, above) if stage in coam else raw
                assert torch.equal(found[stage], above)
        assert len(made.guides) == (2 if agm else 0)
        assert set(made.logged()) == {f"lambda_{stage}" for stage in coam}
        losses = torch.stack(list(made.losses(images, tags, 0).values()))
        losses.sum().backward()  # type: ignore[no-untyped-call]
        assert all(parameter.grad is not None for parameter in made.parameters())

    def test_without_boundary_loss_there_is_no_crf(self, images: Tensor, tags: Tensor) -> None:
        def refuse(*_: Any) -> Any:
            raise AssertionError

        assert network(boundary_weight=0.0).losses(images, tags, 0, refuse)["boundary"] == 0
        with pytest.raises(AssertionError):
            network().losses(images, tags, 0, refuse)

    def test_foreign_features_train_the_first_batch_norm(self) -> None:
        frozen = partial(Backbone, frozen_batch_norm=True)
        block = settings(frozen("vgg16"), frozen("resnet38"), ("conv2_2", "b2"), channels=8)
        norms = {
            name: part for name, part in Agen(block, K).train().named_modules() if isinstance(part, nn.BatchNorm2d)
        }
        learning = [name for name, norm in norms.items() if norm.training and norm.weight.requires_grad]
        assert learning == ["segmentation.stages.b3.0.bn1"]
        assert not any(
            norm.training or norm.weight.requires_grad for name, norm in norms.items() if name not in learning
        )

    def test_steps_lower_the_loss(self, images: Tensor, tags: Tensor) -> None:
        torch.manual_seed(0)
        made = Agen(settings(), K).train()
        groups = parameter_groups(made, made.new_layers(), made.block.training)
        optimizer = build_optimizer(groups, made.block.training)
        totals = []
        for _ in range(20):
            losses = torch.stack(list(made.losses(images, tags, 0).values()))
            optimizer.zero_grad()
            losses.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            totals.append(losses.detach())
        assert torch.stack(totals).isfinite().all()
        assert (torch.stack(totals[-3:]).mean(0)[:2] < 0.7 * totals[0][:2]).all()
        assert all(value != 0 for value in made.logged().values())

    def test_new_layers_are_all_but_the_backbones(self) -> None:
        made = network("mobilenet_v2", "small", ("stage2", "conv2"))
        new = {id(parameter) for module in made.new_layers() for parameter in module.parameters()}
        old = {name for name, parameter in made.named_parameters() if id(parameter) not in new}
        assert old == {
            name for name, _ in made.named_parameters() if name.startswith(("classification.", "segmentation."))
        }

    def test_saved_it_comes_back(self, images: Tensor, tmp_path: Path) -> None:
        made = network("mobilenet_v2", "small", ("stage2", "conv2"), agm=(4, 5), coam=(5,))
        models.save(tmp_path / "model.pt", made, made.block, K)
        loaded = models.load(tmp_path / "model.pt", K, torch.device("cpu"))
        assert isinstance(loaded, Agen)
        assert loaded.block == made.block
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), made(images))

    @pytest.mark.parametrize(
        ("names", "more", "fault"),
        [
            (("small", "small", ("conv6", "conv2")), {}, "shared: conv6 is not a tap of the classification backbone"),
            (("small", "small", ("conv2", "b2")), {}, "shared: b2 is not a tap of the segmentation backbone"),
            (("vgg16", "small", ("conv2_2", "conv2")), {}, "shared: conv2_2 has stride 2 and conv2 4"),
            (
                ("vgg16", "resnet38", ("conv2_2", "b2")),
                {"classification_taps": ("conv1_2", "conv3_3", "conv4_3")},
                "classification_taps: conv1_2 is none of conv2_2, conv3_3, conv4_3, conv5_3",
            ),
        ],
    )
    def test_taps_that_do_not_fit_are_refused(self, names: Any, more: Any, fault: str) -> None:
        with pytest.raises(PipelineError) as caught:
            on_meta(lambda: Agen(settings(*names, **more), K))
        assert caught.value.lines[0].startswith(fault)
