"""The attention guided enhancement network (AGEN): learns segmentation from tags in one training.

The paper is silent or misprinted in places. This implementation takes Eq. 1 as the ordinary sigmoid. It takes 'the
first two layers' that A and B share as stages 1 and 2, because the AGMs are numbered 3 to 5. Branch B's head is a
dilated 3x3 convolution and a 1x1 convolution. An AGM's classification score is pooled after its CoAM. ReLU follows
every 3x3 convolution.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.reader import Count, NonNegative, NonNegativeInt, Range
from pipeline.config.registry import ONE_STEP
from pipeline.config.schema import Crf, Head, OneStep
from pipeline.data.loading import IGNORE
from pipeline.errors import PipelineError
from pipeline.methods.agen_losses import BoundaryLoss, inside, online_labels, seeding_loss
from pipeline.methods.one_step import Mapper, OneStepNetwork, backbone_faults
from pipeline.networks.backbones import Backbone, Tap, build_backbone
from pipeline.networks.base import he_normal
from pipeline.networks.heads import ClassAwareHead, normal

STAGES = (3, 4, 5)
FINAL = 6  # number of the outputs of branches A and B, which follow the last stage


class ContextAttention(nn.Module):
    """The context attention module, CoAM (AGEN Sec. III.3): enhances class-aware maps by those of the stage above.

    ``weight`` is lambda. It starts at 0, where the module is the identity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Enhance the B x C x h x w maps ``lower`` of a stage (Eq. 6 to 9).

        ``upper`` holds the maps of the stage above, at any size; U is ``upper`` resized bilinearly. Pixel i becomes
        F_i + lambda * sum_j softmax_j(F_i . U_j) F_j. The dot products are unscaled and computed in float32, because
        they grow with the square of the scores. torch's fused attention avoids storing the N x N weights (172 MB per
        image at 81 x 81).
        """
        size = [int(side) for side in lower.shape[2:]]
        with torch.autocast(lower.device.type, enabled=False):
            lower = lower.float()
            upper = functional.interpolate(upper.float(), size=size, mode="bilinear", align_corners=False)
            query, key = _pixels(lower), _pixels(upper)
            attended = functional.scaled_dot_product_attention(query, key, query, scale=1.0)
            context = attended[:, 0, :, : lower.shape[1]].transpose(1, 2)
            return lower + self.weight * context.reshape(lower.shape)


def _pixels(maps: Tensor) -> Tensor:
    """Reshape B x C x h x w to B x 1 x hw x C', zero-padded to a multiple of 8 because fused GPU kernels require it."""
    rows = maps.flatten(2).transpose(1, 2)[:, None]
    return functional.pad(rows, (0, -rows.shape[3] % 8))


class StageScores(nn.Module):
    """Branch C (classification) or D (segmentation) of all attention guided modules (AGM; AGEN Fig. 2).

    Each stage has a 3x3 convolution of its own, which adapts its channels. The stages share a 3x3 and a 1x1
    convolution.

    Args:
        taps: the input taps by stage.
        channels: channels of the 3x3 convolutions.
        outputs: K for branch C, K + 1 for branch D.
    """

    def __init__(self, taps: dict[int, Tap], channels: int, outputs: int) -> None:
        super().__init__()
        self.own = nn.ModuleDict(
            {str(stage): nn.Conv2d(tap.channels, channels, 3, padding=1) for stage, tap in taps.items()}
        )
        self.shared = nn.Conv2d(channels, channels, 3, padding=1)
        self.scores = nn.Conv2d(channels, outputs, 1)
        he_normal(self)
        normal(self.scores)

    def forward(self, stage: int, features: Tensor) -> Tensor:
        """Map the B x C x h x w features of a stage to B x ``outputs`` x h x w scores."""
        return cast(Tensor, self.scores(self.shared(self.own[str(stage)](features).relu()).relu()))


Threshold = Annotated[float, Range(above=0, below=1)]
Stage = Annotated[int, Range(least=STAGES[0], most=STAGES[-1])]


@ONE_STEP.register("agen")
class Agen(OneStepNetwork):
    """Classification branch A, segmentation branch B, and attention guided modules (AGM) between their stages.

    Branch B learns from labels that are derived during training from the class-aware maps of A and of the AGMs. Stages
    are numbered 3 to 5, as in the paper.

    Branch A uses the backbone ``classification``, branch B the backbone ``segmentation``. Both branches continue from
    A's features at ``settings.shared``, and B has no stages up to that tap. A 1x1 convolution adapts the number of
    channels if it differs. If A and B are different networks, B's first batch norm has statistics of other features,
    so it is trained even if the backbone's batch norms are frozen.

    Raises:
        PipelineError: a backbone does not support its settings or weights, or a tap does not exist or does not fit.
    """

    @dataclass(frozen=True)
    class Settings:
        """Settings of the branches, the modules between them, the labels, and the joint loss."""

        shared: tuple[str, str]  # tap of A where both branches continue, and the tap of B that it replaces
        classification_taps: tuple[str, str, str] | None = None  # for stages 3 to 5; null: the three after ``shared``
        segmentation_taps: tuple[str, str, str] | None = None
        head: Head = field(default_factory=lambda: Head(2, 1024))  # of branch A
        channels: Count = 512  # of branch B's last 3x3 convolution
        rate: Count = 12  # its dilation
        agm: tuple[Stage, ...] = STAGES  # stages with an attention guided module (Table 2)
        agm_channels: tuple[Count, Count] = (256, 512)  # of the AGMs' classification and segmentation branches (C, D)
        coam: tuple[Stage, ...] = STAGES  # stages whose AGM has a context attention module (Table 3)
        # Which pixels get the label of a class or the background. 'value': score > delta; 'share': score >= (1 - delta)
        # times the class's maximum; 'rank': the fraction delta of pixels with the highest scores. The paper allows all
        # three readings.
        confident: Literal["value", "share", "rank"] = "value"
        delta: tuple[Threshold, Threshold, Threshold, Threshold] = (0.4, 0.4, 0.3, 0.3)  # of AGM-3 to AGM-5, branch A
        background_power: Annotated[float, Range(least=1)] = 8.0  # background score: (1 - strongest)^power (Eq. 4)
        loss_size: Literal["input", "output"] = "input"  # upsample logits to the image, or label at the logits' size
        classification_weight: NonNegative = 1.0  # of L_cls, a mean over classes; the sum of Eq. 10 is K times larger
        boundary_weight: NonNegative = 1.0  # of L_boundary; 0: no CRF
        grid: Count = 41  # cells on the long side of the boundary loss (SEC)
        # CRF of the boundary loss, with xy in grid cells (SEC's values)
        crf: Crf = field(default_factory=lambda: Crf(10, 0.25, 3.0, 80 / 12, 13.0, 10.0))
        delay: NonNegativeInt = 0  # initial epochs that train only the classification branches

        def faults(self) -> Iterator[str]:
            if lacking := sorted(set(self.coam) - set(self.agm)):
                yield f"coam: stage {_joined(lacking)} is none of agm, which has {_joined(self.agm) or 'none'}"

        def faults_in(self, block: OneStep) -> Iterator[str]:
            return backbone_faults(block, "classification", "segmentation")

    settings: Settings

    def __init__(self, block: OneStep, num_classes: int) -> None:
        super().__init__(block, num_classes)
        settings = self.settings
        self.classification = build_backbone(block.backbones["classification"])
        self.segmentation = build_backbone(block.backbones["segmentation"])
        entry = _entry_taps(self.classification, self.segmentation, settings)
        shared_a, shared_b = settings.shared
        self.taps_a = _stage_taps(self.classification, shared_a, settings.classification_taps, "classification_taps")
        self.taps_b = _stage_taps(self.segmentation, shared_b, settings.segmentation_taps, "segmentation_taps")
        stages = self.segmentation.stages
        for name in list(stages)[: list(stages).index(shared_b) + 1]:
            del stages[name]
        if (norm := self.entry_norm()) is not None:
            norm.requires_grad_(True)

        channels_a, channels_b = (tap.channels for tap in entry)
        self.adapter: nn.Module = nn.Identity()
        if channels_a != channels_b:
            self.adapter = nn.Conv2d(channels_a, channels_b, 1)
            he_normal(self.adapter)
        self.head = ClassAwareHead(self.classification.out_channels, settings.head, num_classes)
        rate, width = settings.rate, settings.channels
        features = nn.Conv2d(self.segmentation.out_channels, width, 3, padding=rate, dilation=rate)
        scores = nn.Conv2d(width, num_classes + 1, 1)
        he_normal(features)
        normal(scores)
        self.masks = nn.Sequential(features, nn.ReLU(inplace=True), scores)
        inputs_a, inputs_b = (
            {stage: backbone.taps[taps[stage]] for stage in settings.agm}
            for backbone, taps in ((self.classification, self.taps_a), (self.segmentation, self.taps_b))
        )
        channels_c, channels_d = settings.agm_channels
        self.guides = nn.ModuleList()  # branches C and D of the AGMs; empty without AGMs
        if settings.agm:
            self.guides.extend(
                [StageScores(inputs_a, channels_c, num_classes), StageScores(inputs_b, channels_d, num_classes + 1)]
            )
        self.coam = nn.ModuleDict({str(stage): ContextAttention() for stage in sorted(settings.coam)})

    @property
    def uses_mapper(self) -> bool:
        return self.settings.boundary_weight > 0

    def describe(self) -> str:
        return "AGEN"

    def describe_labels(self) -> str:
        """How the training images are labelled, and from which maps."""
        settings = self.settings
        modules = f"branch A and AGM {_joined(settings.agm)}" if settings.agm else "branch A alone"
        context = f", CoAM {_joined(settings.coam)}" if settings.coam else ""
        boundary = ", boundary loss with dense CRF" if settings.boundary_weight > 0 else ""
        return f"on the fly, by {modules}{context}, background (1 - strongest)^{settings.background_power:g}{boundary}"

    def new_layers(self) -> Iterable[nn.Module]:
        """All layers outside the two backbones."""
        return [self.adapter, self.head, self.masks, self.guides, self.coam]

    def logged(self) -> dict[str, float]:
        """The learned weight lambda (Eq. 8) of each stage that has a CoAM, as 'lambda_STAGE'."""
        weights = {stage: module.get_parameter("weight").detach() for stage, module in self.coam.items()}
        return {f"lambda_{stage}": float(weight) for stage, weight in weights.items()}

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if (norm := self.entry_norm()) is not None:
            norm.train(mode)
        return self

    def entry_norm(self) -> nn.BatchNorm2d | None:
        """B's first batch norm, which receives features of A; None if both backbones are the same network."""
        a, b = self.block.backbones["classification"], self.block.backbones["segmentation"]
        if a.name == b.name:
            return None
        return next((part for part in self.segmentation.modules() if isinstance(part, nn.BatchNorm2d)), None)

    def forward(self, images: Tensor) -> Tensor:
        """Map B x 3 x H x W images to branch B's B x (K + 1) x h x w logits, background first, in float32."""
        shared = self.settings.shared[0]
        return self._segment(_stage_features(self.classification, images, end=shared)[shared])[1]

    def losses(self, images: Tensor, tags: Tensor, epoch: int, mapper: Mapper = map) -> dict[str, Tensor]:
        """The weighted terms of the joint loss (AGEN Eq. 10 to 15): 'classification', 'segmentation', 'boundary'.

        Without AGMs this is the paper's baseline: branch B learns only from the labels that branch A's class-aware maps
        produce. Padding is never labelled. Before epoch ``settings.delay`` only the branches A and C learn.

        Args:
            images: B x 3 x H x W, normalised.
            tags: B x K, 0 or 1.
            epoch: 0-based.
            mapper: computes the dense CRF; see ``BoundaryLoss``.
        """
        settings, shared = self.settings, self.settings.shared[0]
        features = _stage_features(self.classification, images, end=shared)
        segments = epoch >= settings.delay
        boundary = None
        if segments:
            features_b, final = self._segment(features[shared])
            if settings.boundary_weight > 0:  # first, so that the CRF runs in parallel with the rest
                boundary = BoundaryLoss(final, images, settings.grid, settings.crf, mapper)
        features |= _stage_features(self.classification, features[shared], start=shared)
        maps = self.class_maps(features)
        classified = [
            functional.binary_cross_entropy_with_logits(stage_maps.mean((2, 3)), tags) for stage_maps in maps.values()
        ]
        zero = torch.zeros((), device=images.device)
        seeding = zero
        if segments:
            for stage, stage_maps in maps.items():
                logits = final if stage == FINAL else self.guides[1](stage, features_b[self.taps_b[stage]])
                seeding = seeding + self._seeding(logits, stage_maps, images, tags, stage)
        return {
            "classification": settings.classification_weight * torch.stack(classified).sum(),
            "segmentation": seeding,
            "boundary": zero if boundary is None else settings.boundary_weight * boundary.value(),
        }

    def class_maps(self, features: dict[str, Tensor]) -> dict[int, Tensor]:
        """The raw class-aware maps, B x K x h x w in float32, of branch A and the AGMs, by stage from deep to shallow.

        A stage's CoAM uses the maps of the next deeper stage that has an AGM, after that stage's own CoAM. The deepest
        AGM uses the maps of branch A (Eq. 5; Table 1, 'SC').
        """
        above = self.head(features[list(self.classification.taps)[-1]]).float()
        maps = {FINAL: above}
        for stage in sorted(self.settings.agm, reverse=True):
            scores = self.guides[0](stage, features[self.taps_a[stage]]).float()
            above = maps[stage] = self.coam[str(stage)](scores, above) if stage in self.settings.coam else scores
        return maps

    def _segment(self, shared: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Run branch B: return the features of its taps from the shared one on, and its logits."""
        entering = self.adapter(shared)
        features = {self.settings.shared[1]: entering, **_stage_features(self.segmentation, entering)}
        return features, self.masks(list(features.values())[-1]).float()

    def _seeding(self, logits: Tensor, maps: Tensor, images: Tensor, tags: Tensor, stage: int) -> Tensor:
        """The balanced seeding loss of a stage: ``logits`` against the labels that ``maps`` produce."""
        settings = self.settings
        size = (images.shape[2], images.shape[3])
        if settings.loss_size == "output":
            size = (logits.shape[2], logits.shape[3])
        elif logits.shape[2:] != size:
            logits = functional.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
        delta = settings.delta[(*STAGES, FINAL).index(stage)]
        labels = online_labels(maps, tags, size, delta, settings.background_power, settings.confident)
        return seeding_loss(logits, labels.masked_fill(~inside(images, size), IGNORE))


def _stage_features(
    backbone: Backbone, x: Tensor, start: str | None = None, end: str | None = None
) -> dict[str, Tensor]:
    """Run the stages after ``start`` up to and including ``end`` on ``x``; return their features by tap.

    ``start`` None runs from the first stage, ``end`` None to the last.
    """
    names = list(backbone.stages)
    first = 0 if start is None else names.index(start) + 1
    last = len(names) if end is None else names.index(end) + 1
    features = {}
    for name in names[first:last]:
        features[name] = x = backbone.stages[name](x)
    return features


def _joined(stages: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(stages)))


def _entry_taps(a: Backbone, b: Backbone, settings: Agen.Settings) -> tuple[Tap, Tap]:
    """The two taps of ``settings.shared``.

    Raises:
        PipelineError: a tap does not exist or is the last one, or their strides differ.
    """
    for key, name, backbone in zip(("classification", "segmentation"), settings.shared, (a, b), strict=True):
        choices = list(backbone.taps)[:-1]
        if name not in choices:
            raise PipelineError(f"shared: {name} is not a tap of the {key} backbone; choose from {', '.join(choices)}")
    tap_a, tap_b = a.taps[settings.shared[0]], b.taps[settings.shared[1]]
    if tap_a.stride != tap_b.stride:
        raise PipelineError(
            f"shared: {settings.shared[0]} has stride {tap_a.stride} and {settings.shared[1]} {tap_b.stride};"
            " use taps of the same stride"
        )
    return tap_a, tap_b


def _stage_taps(backbone: Backbone, shared: str, named: Sequence[str] | None, key: str) -> dict[int, str]:
    """The input tap of each stage's AGM: ``named``, or else the three after the shared one or the last three.

    Raises:
        PipelineError: a named tap does not exist or lies before the shared one.
    """
    names = list(backbone.taps)
    usable = names[names.index(shared) :]
    if named is None:
        named = usable[1:4] if len(usable) > 3 else names[-3:]
    if missing := [name for name in named if name not in usable]:
        raise PipelineError(f"{key}: {', '.join(missing)} is none of {', '.join(usable)}")
    return dict(zip(STAGES, named, strict=True))
