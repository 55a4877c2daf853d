"""AMR under the methods' contract, its loss by hand, its options, and where it stands in every backbone."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.config.schema import Backbone, Classifier, Suppression
from pipeline.methods.amr import Amr, AmrOutput
from pipeline.methods.base import Method, Output
from pipeline.methods.cam import Cam
from pipeline.training import models
from pipeline.training.settings import parameter_groups
from tests.method_contract import Arithmetic, Array, K, MethodContract, build_method, small_classifier

Settings = Amr.Settings


def made(settings: Classifier, seed: int = 0) -> Amr:
    torch.manual_seed(seed)
    method = build_method(settings, K)
    assert isinstance(method, Amr)
    return method


def amr(**settings: Any) -> Classifier:
    return small_classifier("amr", Settings(**settings))


class Formula:
    """AMR in NumPy float64, sample by sample."""

    def __init__(self, settings: Amr.Settings, weights: dict[str, Array]) -> None:
        self.settings, self.weights = settings, weights

    def gates(self, values: Array) -> Array:
        """One sample's or, with batch statistics, all samples' values."""
        z = (values - values.mean()) / np.sqrt(((values - values.mean()) ** 2).mean() + 1e-5)
        if self.settings.function == "threshold":
            return (z > -1e-3).astype(float)  # the implementation's tolerance, which lets equal values pass
        bell: Array = np.exp(-(z**2) / 2)
        if self.settings.function == "density":
            return bell / np.sqrt(2 * np.pi * (((values - values.mean()) ** 2).mean() + 1e-5))
        return bell / bell.mean()

    def each(self, values: Array) -> Array:
        if self.settings.statistics == "batch":
            return self.gates(values)
        return np.stack([self.gates(one) for one in values])

    def modulated(self, number: int, x: Array) -> Array:
        part = 0
        if self.settings.channel:
            names = f"modulations.{number}.0.sensitivity"
            first, second = ((self.weights[f"{names}.{n}.weight"], self.weights[f"{names}.{n}.bias"]) for n in (0, 2))
            hidden = np.maximum(x.mean((2, 3)) @ first[0].T + first[1], 0)
            x = x * self.each(hidden @ second[0].T + second[1])[:, :, None, None]
            part = 1
        if self.settings.spatial:
            names = f"modulations.{number}.{part}.sensitivity"
            pooled = np.stack([x.max(1), x.mean(1)], 1)
            norm = (self.weights[f"{names}.1.{name}"] for name in ("weight", "bias", "running_mean", "running_var"))
            found = Arithmetic.batch_norm(Arithmetic.conv(pooled, self.weights[f"{names}.0.weight"], padding=3), *norm)
            x = x * self.each(found)
        return x

    def branch(self, prefix: str, images: Array, modulate: bool) -> Array:
        """The class-aware maps."""
        weights = {name.removeprefix(prefix): value for name, value in self.weights.items() if name.startswith(prefix)}
        stem = self.settings.shared == "stem"  # the two layers of the first stage, the spotlight branch's
        stages = {name: value for name, value in self.weights.items() if name.startswith("backbone.stages.conv2.")}
        weights |= stages if stem else {}

        def after(number: int, x: Array) -> Array:
            number -= 2 if stem else 0
            return self.modulated(number, x) if modulate and number >= 0 else x

        features = Arithmetic.small_backbone(weights, images, after)
        head = Arithmetic.conv(features, weights["head.convs.0.weight"], weights["head.convs.0.bias"], padding=1)
        return Arithmetic.conv(np.maximum(head, 0), weights["head.classifier.weight"], weights["head.classifier.bias"])

    def maps(self, images: Array) -> tuple[Array, Array]:
        return self.branch("", images, False), self.branch("compensation.", images, True)


class AmrContract(MethodContract):
    """AMR's own way through the contract; each subclass is a setting of it."""

    def expected(self, weights: dict[str, Array], images: Array) -> tuple[Array, Array]:
        spotlight, compensation = Formula(self.block.method.settings, weights).maps(images)
        xi = self.block.method.settings.xi
        maps = xi * spotlight + (1 - xi) * compensation  # AMR Eq. 2
        return maps.mean((2, 3)), maps

    def test_extreme_logits_leave_the_loss_finite(self, method: Method) -> None:
        """Of both branches."""
        logits = torch.full((2, K), 1e4, requires_grad=True)
        branch = Output(logits, torch.zeros(2, K, 3, 3))
        loss = method.loss(AmrOutput(logits, branch.maps, branch, branch), torch.zeros(2, K))
        loss.backward()  # type: ignore[no-untyped-call]
        assert loss.isfinite()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        assert logits.grad.any()

    def test_localization_is_recalibrated(self, method: Method, images: Tensor) -> None:
        """Each branch's positive part over its maximum, then the weighted sum."""
        method.eval()
        weights = {name: value.double().numpy() for name, value in method.state_dict().items()}
        expected = np.zeros(())
        for share, maps in zip(
            (self.block.method.settings.xi, 1 - self.block.method.settings.xi),
            Formula(self.block.method.settings, weights).maps(images.double().numpy()),
            strict=True,
        ):
            positive = np.maximum(maps, 0)
            expected = expected + share * positive / np.maximum(positive.max((2, 3), keepdims=True), 1e-5)
        with torch.no_grad():
            found = method.localize(images)
        assert np.abs(found.numpy() - expected).max() < 2e-3
        assert expected.max() > 0.5


class TestAmr(AmrContract):
    block = amr()

    def test_no_settings_are_the_defaults(self, method: Method, images: Tensor) -> None:
        plain = made(small_classifier(method="amr")).eval()
        plain.load_state_dict(method.eval().state_dict())
        with torch.no_grad():
            assert torch.equal(plain(images).maps, method(images).maps)

    def test_both_branches_carry_their_heads_logits(self, method: Method, images: Tensor) -> None:
        output = method.eval()(images)
        assert isinstance(output, AmrOutput)
        for branch in (output, output.spotlight, output.compensation):
            torch.testing.assert_close(branch.logits, branch.maps.mean((2, 3)))
        assert not torch.allclose(output.spotlight.maps, output.compensation.maps)


class TestAmrOverASharedStem(AmrContract):
    block = amr(shared="stem", function="density", xi=0.3, consistency=1.0)


class TestAmrWithThresholds(AmrContract):
    block = amr(function="threshold", spatial=False)


class TestAmrInPositionsAlone(AmrContract):
    block = amr(channel=False, reduction=4, consistency=0.0)


class TestAmrOverTheBatch(AmrContract):
    block = amr(statistics="batch", reduction=8)

    def test_samples_of_a_batch_are_apart(self, method: Method, images: Tensor) -> None:
        """They are not: the public code's statistics are the whole batch's."""
        method.eval()
        with torch.no_grad():
            together, alone = method(images), method(images[2:3])
        torch.testing.assert_close(together.spotlight.maps[2:3], alone.spotlight.maps, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(together.compensation.maps[2:3], alone.compensation.maps, rtol=0.01)


class TestLoss:
    """A network is not needed: the branches' outputs are given."""

    spotlight = Output(torch.zeros(1, K), torch.tensor([-1.0, 2.0, 0.0, 0.0, 3.0]).view(1, K, 1, 1).repeat(1, 1, 1, 2))
    compensation = Output(torch.full((1, K), 2.0), torch.tensor([-5.0, 1.0, 0.0, 2.0, -1.0]).view(1, K, 1, 1))
    compensation = Output(compensation.logits, compensation.maps.repeat(1, 1, 1, 2))
    output = AmrOutput(spotlight.logits, spotlight.maps, spotlight, compensation)
    tags = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0]])

    @pytest.mark.parametrize("consistency", [0.0, 0.05, 1.0])
    def test_by_hand(self, consistency: float) -> None:
        """Eq. 10: half of log 2 and half of a cross entropy; Eq. 11 on the positive parts: (0 + 1 + 0 + 2 + 3) / 5."""
        compensation = (2 * math.log1p(math.exp(-2)) + 3 * (2 + math.log1p(math.exp(-2)))) / 5
        expected = (math.log(2) + compensation) / 2 + consistency * 6 / 5
        found = made(amr(consistency=consistency)).loss(self.output, self.tags)
        assert float(found) == pytest.approx(expected)

    def test_cross_pseudo_supervision_is_over_every_image(self) -> None:
        def doubled(branch: Output, factor: float) -> Output:
            return Output(branch.logits.repeat(2, 1), torch.cat([branch.maps, factor * branch.maps]))

        both = doubled(self.spotlight, 3), doubled(self.compensation, 3)
        output = AmrOutput(both[0].logits, both[0].maps, *both)
        losses = [made(amr(consistency=c)).loss(output, self.tags.repeat(2, 1)) for c in (0.0, 1.0)]
        assert float(losses[1] - losses[0]) == pytest.approx((6 / 5 + 3 * 6 / 5) / 2)


class TestSettings:
    @pytest.fixture
    def images(self) -> Tensor:
        return torch.randn(3, 3, 32, 40, generator=torch.Generator().manual_seed(3))

    def test_without_modulation_it_is_two_plain_classifiers(self, images: Tensor) -> None:
        method = made(amr(channel=False, spatial=False)).eval()
        assert len(method.modulations) == 0
        output = method(images)
        for prefix, branch in (("", output.spotlight), ("compensation.", output.compensation)):
            cam = Cam(small_classifier(), K).eval()
            state = {name.removeprefix(prefix): value for name, value in method.state_dict().items()}
            cam.load_state_dict({name: state[name] for name in cam.state_dict()})
            torch.testing.assert_close(branch.maps, cam(images).maps)

    @pytest.mark.parametrize(
        "changed",
        [
            {"channel": False},
            {"spatial": False},
            {"function": "density"},
            {"function": "threshold"},
            {"statistics": "batch"},
        ],
        ids=str,
    )
    def test_each_changes_the_compensation_branch_alone(self, images: Tensor, changed: dict[str, Any]) -> None:
        one, other = made(amr()).eval(), made(amr(**changed)).eval()
        state = one.state_dict()
        own = other.state_dict()
        same = {name: state[name] for name in own if name in state and state[name].shape == own[name].shape}
        other.load_state_dict(same, strict=False)
        with torch.no_grad():
            before, after = one(images), other(images)
        assert torch.equal(before.spotlight.maps, after.spotlight.maps)
        assert not torch.allclose(before.compensation.maps, after.compensation.maps)

    @pytest.mark.parametrize("xi", [0.0, 0.3, 1.0])
    def test_xi_is_the_spotlights_share(self, images: Tensor, xi: float) -> None:
        output = made(amr(xi=xi)).eval()(images)
        expected = xi * output.spotlight.maps + (1 - xi) * output.compensation.maps
        torch.testing.assert_close(output.maps, expected)

    def test_a_stem_is_shared_and_learns_from_both(self, images: Tensor) -> None:
        method = made(amr(shared="stem"))
        assert not any(name.startswith("compensation.backbone.stages.conv2.") for name in method.state_dict())
        assert len(method.modulations) == 4  # none in the stem
        stem = next(method.backbone.parameters())
        output = method(images)
        for branch in (output.spotlight, output.compensation):
            (gradient,) = torch.autograd.grad(branch.logits.sum(), stem, retain_graph=True)
            assert gradient.any()

    def test_apart_nothing_is_shared(self, images: Tensor) -> None:
        method = made(amr())
        output = method(images)
        gradients = torch.autograd.grad(
            output.compensation.logits.sum(),
            [*method.backbone.parameters(), *method.head.parameters()],
            allow_unused=True,
        )
        assert all(gradient is None for gradient in gradients)

    def test_heads_may_learn_at_the_new_layers_rate(self) -> None:
        block = amr(fast="heads")
        method = made(block)
        groups = parameter_groups(method, method.new_layers(), replace(block.training, lr_new=10.0, lr_bias=1.0))
        fast = {id(parameter) for group in groups if group["multiplier"] == 10 for parameter in group["params"]}  # type: ignore[attr-defined]
        names = {name for name, parameter in method.named_parameters() if id(parameter) in fast}
        assert names == {
            name
            for name, _ in method.named_parameters()
            if name.startswith(("head.", "compensation.head.", "modulations."))
        }

    def test_the_compensation_backbone_learns_at_the_new_layers_rate(self) -> None:
        """METHODS: spotlight branch and both heads 0.01, compensation backbone and its modulation 0.1."""
        for shared in ("nothing", "stem"):
            block = amr(shared=shared)
            settings = replace(block.training, lr_new=10.0, lr_bias=1.0)
            method = made(block)
            groups = parameter_groups(method, method.new_layers(), settings)
            rates = {id(parameter): group["multiplier"] for group in groups for parameter in group["params"]}  # type: ignore[attr-defined]
            names = dict(method.named_parameters())
            assert set(rates) == {id(parameter) for parameter in names.values()}
            for name, parameter in names.items():
                fast = name.startswith(("compensation.backbone.", "modulations."))
                assert rates[id(parameter)] == (10 if fast else 1), name

    def test_frozen_batch_norms_are_the_backbones_alone(self, images: Tensor) -> None:
        block = amr()
        method = made(replace(block, backbone=replace(block.backbone, frozen_batch_norm=True))).train()
        norms = {name: m for name, m in method.named_modules() if isinstance(m, nn.BatchNorm2d)}
        assert {name for name, norm in norms.items() if norm.training} == {
            f"modulations.{number}.1.sensitivity.1" for number in range(6)
        }
        before = {name: norm.running_mean.clone() for name, norm in norms.items()}  # type: ignore[union-attr]
        method(images)
        changed = {name for name, norm in norms.items() if not torch.equal(norm.running_mean, before[name])}  # type: ignore[arg-type]
        assert changed == {name for name, norm in norms.items() if norm.training}
        assert not any(module.training for module in method.eval().modules())

    @pytest.mark.parametrize("shared", ["nothing", "stem"])
    def test_frozen_stages_are_both_branches(self, images: Tensor, shared: str) -> None:
        """Under learnable suppression, too; what modulates and suppresses within them learns."""
        frozen = Backbone("small", frozen=("conv2", "conv4"))
        method = made(replace(amr(shared=shared), backbone=frozen, suppression=Suppression())).train()
        method.loss(method(images), torch.eye(K)[:3]).backward()  # type: ignore[no-untyped-call]
        for name, parameter in method.named_parameters():
            assert (parameter.grad is None) is (".conv2." in name or ".conv4." in name), name

    def test_a_plain_classifier_starts_both_branches(self, tmp_path: Path) -> None:
        """The public code's first stage: its model.pt as ``backbone.weights``."""
        cam = Cam(small_classifier(), K)
        models.save(tmp_path / "model.pt", cam, small_classifier(), K)
        method = made(replace(amr(), backbone=Backbone("small", weights=str(tmp_path / "model.pt"))), seed=7)
        for backbone in (method.backbone, method.compensation.backbone):
            assert all(
                torch.equal(value, cam.backbone.state_dict()[key]) for key, value in backbone.state_dict().items()
            )

    @pytest.mark.parametrize("shared", ["nothing", "stem"])
    def test_a_frozen_spotlight_keeps_its_backbone_and_learns_its_head(self, images: Tensor, shared: str) -> None:
        """Also in training mode; the compensation branch's own stages, whose weights are the same, learn."""
        method = made(amr(shared=shared, spotlight="frozen")).train()
        before = {name: value.clone() for name, value in method.backbone.state_dict().items()}
        method.loss(method(images), torch.eye(K)[:3]).backward()  # type: ignore[no-untyped-call]
        assert {name: torch.equal(value, before[name]) for name, value in method.backbone.state_dict().items()} == (
            dict.fromkeys(before, True)
        )
        for name, parameter in method.named_parameters():
            assert (parameter.grad is None) is name.startswith("backbone."), name

    def test_random_weights_are_not_frozen(self) -> None:
        (line,) = Settings(spotlight="frozen").faults_in(small_classifier())
        assert line.startswith("method.amr.spotlight: would freeze random weights; set backbone.weights")
        assert not list(Settings(spotlight="frozen").faults_in(replace(amr(), backbone=Backbone("small", weights="x"))))
        assert not list(Settings().faults_in(small_classifier()))

    @pytest.mark.parametrize("function", ["gaussian", "density", "threshold"])
    def test_blank_and_single_images_in_bf16_stay_finite(self, function: str) -> None:
        method = made(amr(function=function)).train()
        for images in (torch.zeros(1, 3, 32, 32), torch.full((2, 3, 32, 32), 2.0), torch.randn(1, 3, 16, 16)):
            method.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                output = method(images)
                loss = method.loss(output, torch.ones(len(images), K))
            loss.backward()  # type: ignore[no-untyped-call]
            assert loss.isfinite()
            assert output.maps.isfinite().all()
            assert method.localization(output).isfinite().all()
            assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
