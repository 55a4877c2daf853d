"""Activation modulation and recalibration (AMR): combines a spotlight branch and a compensation branch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from pipeline.config.reader import Count, NonNegative, Share
from pipeline.config.registry import METHODS
from pipeline.config.schema import Classifier
from pipeline.methods.base import Method, Output, occlude
from pipeline.methods.modulation import attention_modulation
from pipeline.networks.backbones import build_backbone
from pipeline.networks.base import attach
from pipeline.networks.heads import ClassAwareHead


@dataclass(frozen=True, eq=False)
class AmrOutput(Output):
    """The recalibrated logits and maps, and the outputs of both branches."""

    spotlight: Output
    compensation: Output


class Branch(nn.Module):
    """A backbone and its class-aware head."""

    def __init__(self, block: Classifier, num_classes: int) -> None:
        super().__init__()
        self.backbone = build_backbone(block.backbone)
        self.head = ClassAwareHead(self.backbone.out_channels, block.head, num_classes)


@METHODS.register("amr")
class Amr(Method):
    """Two classifiers, the spotlight branch and the compensation branch, whose features AMMs modulate (AMR Fig. 2).

    AMMs follow the modules of ``Backbone.increments``: in every residual block before the addition, as in the public
    code, or after every layer of a plain network. ``layers`` restricts them to these taps (the paper draws one AMM).
    Both branches are trained together. The public code instead trains a plain classifier first and freezes it as the
    spotlight branch. ``spotlight: frozen`` with ``backbone.weights`` set to the model.pt of such a classifier does so,
    except that the spotlight branch's head is trained anew.

    ``backbone`` and ``head`` belong to the spotlight branch and have the same names as in ``Cam``. With
    ``shared: stem``, the spotlight branch's first stage feeds both branches and has no AMMs.
    """

    map_name = "Recalibrated CAM"

    @dataclass(frozen=True)
    class Settings:
        """Settings of the modulation modules and of the joint training of both branches."""

        channel: bool = True  # channel attention modulation in the compensation branch (Table 3: AMM_c)
        spatial: bool = True  # spatial attention modulation (AMM_s)
        layers: tuple[str, ...] | None = None  # taps of the backbone whose layers are modulated; null: all (the code)
        # Modulation function (Table 4); density: the normal density, with height 1 / (sqrt(2 pi) sigma) (the code)
        function: Literal["gaussian", "density", "threshold"] = "gaussian"
        statistics: Literal["sample", "batch"] = "sample"  # over which the Gaussian's mean and deviation are computed
        reduction: Count = 16  # ratio of channels to hidden units in the channel modulation
        consistency: NonNegative = 0.05  # weight of cross pseudo supervision, L_cps (the code; the paper: 1); 0: none
        xi: Share = 0.5  # share of the spotlight branch in the recalibrated maps (Table 5)
        shared: Literal["nothing", "stem"] = "nothing"  # part of the backbone that both branches share
        # Layers that learn at lr * lr_new, beside the AMMs: the compensation branch's backbone (the code, whose
        # spotlight branch is a trained classifier), or both heads, as in other methods
        fast: Literal["compensation", "heads"] = "compensation"
        # frozen: the spotlight branch's backbone keeps its weights and statistics; its head learns
        spotlight: Literal["trained", "frozen"] = "trained"

        def faults_in(self, block: Classifier) -> Iterator[str]:
            if self.spotlight == "frozen" and block.backbone.weights is None:
                yield "method.amr.spotlight: would freeze random weights; set backbone.weights to a trained model.pt"
            if self.statistics == "batch" and block.training.processes > 1:
                yield "method.amr.statistics: batch needs training.processes 1, or set it to sample"

    settings: Settings

    def __init__(self, block: Classifier, num_classes: int) -> None:
        super().__init__(block, num_classes)
        self.backbone = build_backbone(block.backbone)
        self.head = ClassAwareHead(self.backbone.out_channels, block.head, num_classes)
        self.compensation = Branch(block, num_classes)
        self.modulations = nn.ModuleList()
        if self.settings.channel or self.settings.spatial:
            self._modulate()
        if self.settings.shared == "stem":
            del self.compensation.backbone.stages[self._stem], self.compensation.backbone.taps[self._stem]
        if self.settings.spotlight == "frozen":
            self.backbone.freeze(tuple(self.backbone.taps))

    def describe(self) -> str:
        """Such as 'AMR (Gaussian modulation of channels and positions, consistency 0.05, ...)'."""
        settings = self.settings
        places = [place for place, on in (("channels", settings.channel), ("positions", settings.spatial)) if on]
        function = {"gaussian": "Gaussian", "density": "Gaussian density"}.get(settings.function, settings.function)
        over = " over the batch" if settings.statistics == "batch" else ""
        parts = [
            f"{function} modulation of {' and '.join(places)}{over}" if places else "no modulation",
            f"consistency {settings.consistency:g}",
            f"xi {settings.xi:g}",
            f"branches share {settings.shared if settings.shared == 'nothing' else f'the {settings.shared}'}",
            *(["frozen spotlight branch"] if settings.spotlight == "frozen" else []),
        ]
        return f"AMR ({', '.join(parts)})"

    @property
    def _stem(self) -> str:
        return next(iter(self.backbone.taps))

    def _modulate(self) -> None:
        """Attach the AMMs to the compensation branch.

        Raises:
            PipelineError: the compensation branch has no layer of a name in ``layers``.
        """
        backbone = self.compensation.backbone
        increments = backbone.increments()
        if self.settings.shared == "stem":
            del increments[self._stem]
        self.modulations.extend(
            attach(
                backbone,
                increments,
                self.settings.layers,
                "method.amr.layers",
                lambda channels: attention_modulation(channels, self.settings),
            )
        )

    @property
    def is_mean(self) -> bool:
        return self.settings.statistics == "sample"

    def new_layers(self) -> Iterable[nn.Module]:
        """The AMMs, and the compensation branch's backbone, even if pretrained, or with ``fast: heads`` both heads.

        The public code trains the former at a rate of 0.1, and the spotlight branch and both heads at 0.01. The
        settings ``lr: 0.01`` and ``lr_new: 10`` reproduce this.
        """
        heads = [self.head, self.compensation.head]
        fast = heads if self.settings.fast == "heads" else [self.compensation.backbone]
        return [*fast, self.modulations, self.suppressors]

    def layers(self) -> dict[str, list[nn.Module]]:
        """The spotlight branch's layers, named as in ``Cam``, and the compensation branch's, as 'compensation_NAME'."""
        spotlight = _layers(self)
        return spotlight | {f"compensation_{name}": modules for name, modules in _layers(self.compensation).items()}

    def forward(self, images: Tensor, occluded: Tensor | None = None) -> AmrOutput:
        """Run both branches; logits and raw maps are weighted sums, the spotlight with weight ``xi`` (AMR Eq. 2)."""
        first, last = self._stem, list(self.backbone.taps)[-1]
        features = self.backbone.features(images, [first, last])
        spotlight = _classify(self.head, features[last], occluded)
        start = features[first] if self.settings.shared == "stem" else images
        compensation = _classify(self.compensation.head, self.compensation.backbone(start), occluded)
        return AmrOutput(
            self._recalibrate(spotlight.logits, compensation.logits),
            self._recalibrate(spotlight.maps, compensation.maps),
            spotlight,
            compensation,
        )

    def loss(self, output: Output, tags: Tensor) -> Tensor:
        """The mean of both branches' classification losses (AMR Eq. 10), and cross pseudo supervision (Eq. 11).

        L_cps is the mean absolute difference between the positive parts of the branches' class activation maps, over
        all images, classes and positions. The public code compares only two images of a batch.
        """
        assert isinstance(output, AmrOutput)
        total = (super().loss(output.spotlight, tags) + super().loss(output.compensation, tags)) / 2
        if self.settings.consistency > 0:
            spotlight, compensation = (branch.maps.float().relu() for branch in (output.spotlight, output.compensation))
            total = total + self.settings.consistency * (spotlight - compensation).abs().mean()
        return total

    def localization(self, output: Output) -> Tensor:
        """The recalibrated maps (AMR Eq. 2) of branch maps that are each divided by their maximum (the public code).

        Thus every scale and flip has the same weight when maps are fused.
        """
        assert isinstance(output, AmrOutput)
        return self._recalibrate(*(_normalised(branch.maps) for branch in (output.spotlight, output.compensation)))

    def _recalibrate(self, spotlight: Tensor, compensation: Tensor) -> Tensor:
        return self.settings.xi * spotlight + (1 - self.settings.xi) * compensation


def _layers(branch: Amr | Branch) -> dict[str, list[nn.Module]]:
    activations: list[nn.Module] = [module for module in branch.head.convs if isinstance(module, nn.ReLU)]
    return branch.backbone.layers() | ({"head": activations} if activations else {})


def _classify(head: ClassAwareHead, features: Tensor, occluded: Tensor | None) -> Output:
    maps = head.classify(occlude(head.penultimate(features), occluded))
    return Output(maps.float().mean((2, 3)), maps)


def _normalised(maps: Tensor) -> Tensor:
    """Scale B x K x h x w maps to a maximum of 1, with negative values set to 0; maps without positive values are 0."""
    positive = maps.float().relu()
    return positive / positive.amax((2, 3), keepdim=True).clamp_min(1e-5)
