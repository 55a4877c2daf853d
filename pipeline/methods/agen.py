"""The attention guided enhancement network (AGEN): tags in, masks out, in one training.

Decided where the paper is silent or misprinted: Eq. 1 is the ordinary sigmoid; 'the first two layers' that A and B
share are stages 1 and 2, of which the AGMs' numbers 3 to 5 tell; branch B's head is a dilated 3x3 convolution and a 1x1
one; an AGM's classification score is pooled after its CoAM; ReLU follows every 3x3 convolution.
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
from pipeline.methods.one_step import Mapper, OneStepNetwork, wrong_backbones
from pipeline.networks.backbones import Backbone, Tap, build_backbone
from pipeline.networks.base import he_normal
from pipeline.networks.heads import ClassAwareHead, normal

STAGES = (3, 4, 5)
FINAL = 6  # branch A and branch B themselves, after the last stage


class ContextAttention(nn.Module):
    """The context attention module, CoAM (AGEN Sec. III.3): class-aware maps enhanced by those of the stage above.

    ``weight`` is lambda, which starts at 0, where the module changes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, lower: Tensor, upper: Tensor) -> Tensor:
        """B x C x h x w maps of a stage, and of the stage above at any size, to those of the stage (Eq. 6 to 9).

        Pixel i becomes F_i + lambda * sum_j softmax_j(F_i . U_j) F_j, U the upper maps resized (bilinear). The products
        are not scaled and taken in float32, since they grow with the squares of scores. The attention is torch's fused
        one: the pixels' N x N weights, 172 MB an image at 81 x 81, are never stored.
        """
        size = [int(side) for side in lower.shape[2:]]
        with torch.autocast(lower.device.type, enabled=False):
            lower = lower.float()
            upper = functional.interpolate(upper.float(), size=size, mode="bilinear", align_corners=False)
            query, key = _pixels(lower), _pixels(upper)
            found = functional.scaled_dot_product_attention(query, key, query, scale=1.0)
            context = found[:, 0, :, : lower.shape[1]].transpose(1, 2)
            return lower + self.weight * context.reshape(lower.shape)


def _pixels(maps: Tensor) -> Tensor:
    """B x C x h x w as B x 1 x hw x C', C' the next multiple of 8, filled with 0: GPU kernels fuse no other widths."""
    rows = maps.flatten(2).transpose(1, 2)[:, None]
    return functional.pad(rows, (0, -rows.shape[3] % 8))


class StageScores(nn.Module):
    """A branch of all attention guided modules (AGM): C, which classifies, or D, which segments (AGEN Fig. 2).

    A 3x3 convolution of each stage's own adapts its channels; a 3x3 and a 1x1 convolution are shared by the stages.

    Args:
        taps: by stage, the features that it takes.
        channels: of the 3x3 convolutions.
        outputs: K of branch C, K + 1 of branch D.
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
        """B x C x h x w features of a stage to B x ``outputs`` x h x w scores."""
        return cast(Tensor, self.scores(self.shared(self.own[str(stage)](features).relu()).relu()))


Threshold = Annotated[float, Range(above=0, below=1)]
Stage = Annotated[int, Range(least=STAGES[0], most=STAGES[-1])]


@ONE_STEP.register("agen")
class Agen(OneStepNetwork):
    """Branch A (tags), branch B (masks), and attention guided modules between their stages.

    Branch B learns from labels that the class-aware maps of A and of the attention guided modules (AGM) give while all
    of them train. Stages are counted as in the paper, 3 to 5.

    The backbones are ``classification``, of A, and ``segmentation``, of B. Both branches go on from A's features at
    ``settings.shared``; the stages of B up to there are left out. A 1x1 convolution
    stands between where the numbers of channels differ. Where B's next stage was made for another network's features,
    its first batch norm trains even if the backbone's are frozen: its statistics are foreign.

    Raises:
        PipelineError: the backbones cannot have their settings or weights, or a tap does not exist or does not fit.
    """

    @dataclass(frozen=True)
    class Settings:
        """Of the branches, the modules between them, the labels, and the joint loss."""

        shared: tuple[str, str]  # tap of A whose features both branches go on from, and the tap of B it stands for
        classification_taps: tuple[str, str, str] | None = None  # of stages 3 to 5; null: the three after ``shared``
        segmentation_taps: tuple[str, str, str] | None = None
        head: Head = field(default_factory=lambda: Head(2, 1024))  # of branch A
        channels: Count = 512  # of branch B's last 3x3 convolution
        rate: Count = 12  # its dilation
        agm: tuple[Stage, ...] = STAGES  # stages with an attention guided module (Table 2)
        agm_channels: tuple[Count, Count] = (256, 512)  # of the AGMs' classification and segmentation branches (C, D)
        coam: tuple[Stage, ...] = STAGES  # stages whose AGM has a context attention module (Table 3)
        # Which pixels a class or the background labels: 'value': score > delta; 'share': score >= (1 - delta) of the
        # class's maximum; 'rank': the pixels of the highest scores, delta of all. The paper can be read in all three
        # ways.
        confident: Literal["value", "share", "rank"] = "value"
        delta: tuple[Threshold, Threshold, Threshold, Threshold] = (0.4, 0.4, 0.3, 0.3)  # of AGM-3 to AGM-5, branch A
        background_power: Annotated[float, Range(least=1)] = 8.0  # background score: (1 - strongest)^power (Eq. 4)
        loss_size: Literal["input", "output"] = "input"  # logits upsampled to the image; or labels at the logits' size
        classification_weight: NonNegative = 1.0  # of L_cls, the mean over classes; Eq. 10 sums: times their number
        boundary_weight: NonNegative = 1.0  # of L_boundary; 0: no CRF
        grid: Count = 41  # cells on the long side of what the boundary loss compares (SEC)
        # Of the boundary loss, xy in its cells; SEC's
        crf: Crf = field(default_factory=lambda: Crf(10, 0.25, 3.0, 80 / 12, 13.0, 10.0))
        delay: NonNegativeInt = 0  # epochs that train the classification branches alone

        def faults(self) -> Iterator[str]:
            if lacking := sorted(set(self.coam) - set(self.agm)):
                yield f"coam: stage {_listed(lacking)} is none of agm, which has {_listed(self.agm) or 'none'}"

        def faults_in(self, block: OneStep) -> Iterator[str]:
            return wrong_backbones(block, "classification", "segmentation")

    settings: Settings

    def __init__(self, block: OneStep, num_classes: int) -> None:
        super().__init__(block, num_classes)
        settings = self.settings
        self.classification = build_backbone(block.backbones["classification"])
        self.segmentation = build_backbone(block.backbones["segmentation"])
        entry = _entries(self.classification, self.segmentation, settings)
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
        found_a, found_b = (
            {stage: backbone.taps[taps[stage]] for stage in settings.agm}
            for backbone, taps in ((self.classification, self.taps_a), (self.segmentation, self.taps_b))
        )
        classifies, segments = settings.agm_channels
        self.guides = nn.ModuleList()  # branches C and D of the AGMs, where there are any
        if settings.agm:
            self.guides.extend(
                [StageScores(found_a, classifies, num_classes), StageScores(found_b, segments, num_classes + 1)]
            )
        self.coam = nn.ModuleDict({str(stage): ContextAttention() for stage in sorted(settings.coam)})

    @property
    def uses_mapper(self) -> bool:
        return self.settings.boundary_weight > 0

    def describe(self) -> str:
        return "AGEN"

    def describe_labels(self) -> str:
        """Which maps label the training images, and how."""
        settings = self.settings
        modules = f"branch A and AGM {_listed(settings.agm)}" if settings.agm else "branch A alone"
        context = f", CoAM {_listed(settings.coam)}" if settings.coam else ""
        boundary = ", boundary loss with dense CRF" if settings.boundary_weight > 0 else ""
        return f"on the fly, by {modules}{context}, background (1 - strongest)^{settings.background_power:g}{boundary}"

    def new_layers(self) -> Iterable[nn.Module]:
        """All but the two backbones."""
        return [self.adapter, self.head, self.masks, self.guides, self.coam]

    def logged(self) -> dict[str, float]:
        """For each stage with a CoAM the weight that it has learned (Eq. 8), as 'lambda_STAGE'."""
        weights = {stage: module.get_parameter("weight").detach() for stage, module in self.coam.items()}
        return {f"lambda_{stage}": float(weight) for stage, weight in weights.items()}

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if (norm := self.entry_norm()) is not None:
            norm.train(mode)
        return self

    def entry_norm(self) -> nn.BatchNorm2d | None:
        """The batch norm where features of A enter B, if B's were those of another network."""
        one, other = self.block.backbones["classification"], self.block.backbones["segmentation"]
        if one.name == other.name:
            return None
        return next((part for part in self.segmentation.modules() if isinstance(part, nn.BatchNorm2d)), None)

    def forward(self, images: Tensor) -> Tensor:
        """B x 3 x H x W images to B x (K + 1) x h x w logits of branch B, background first, in float32."""
        shared = self.settings.shared[0]
        return self._segment(_run(self.classification, images, end=shared)[shared])[1]

    def losses(self, images: Tensor, tags: Tensor, epoch: int, mapper: Mapper = map) -> dict[str, Tensor]:
        """The terms of the joint loss (AGEN Eq. 10 to 15), weighted: 'classification', 'segmentation', 'boundary'.

        Without AGMs this is the paper's baseline: branch B learns from the labels that branch A's own class-aware maps
        give, and from nothing else. Padding is never labelled. Before epoch ``settings.delay`` only A and C learn.

        Args:
            images: B x 3 x H x W, normalised.
            tags: B x K, 0 or 1.
            epoch: counted from 0.
            mapper: computes the dense CRF; see ``BoundaryLoss``.
        """
        settings, shared = self.settings, self.settings.shared[0]
        features = _run(self.classification, images, end=shared)
        segments = epoch >= settings.delay
        boundary = None
        if segments:
            features_b, final = self._segment(features[shared])
            if settings.boundary_weight > 0:  # first, so that the CRF runs beside all the rest
                boundary = BoundaryLoss(final, images, settings.grid, settings.crf, mapper)
        features |= _run(self.classification, features[shared], start=shared)
        maps = self.class_maps(features)
        pooled = [functional.binary_cross_entropy_with_logits(found.mean((2, 3)), tags) for found in maps.values()]
        none = torch.zeros((), device=images.device)
        seeded = none
        if segments:
            for stage, found in maps.items():
                logits = final if stage == FINAL else self.guides[1](stage, features_b[self.taps_b[stage]])
                seeded = seeded + self._seeded(logits, found, images, tags, stage)
        return {
            "classification": settings.classification_weight * torch.stack(pooled).sum(),
            "segmentation": seeded,
            "boundary": none if boundary is None else settings.boundary_weight * boundary.value(),
        }

    def class_maps(self, features: dict[str, Tensor]) -> dict[int, Tensor]:
        """By stage, from above, the raw class-aware maps B x K x h x w of branch A and of the AGMs, in float32.

        CoAM enhances a stage's maps by those of the next stage above that has any, as they are after that one's CoAM;
        over the topmost AGM are the maps of branch A (Eq. 5; Table 1, 'SC').
        """
        above = self.head(features[list(self.classification.taps)[-1]]).float()
        maps = {FINAL: above}
        for stage in sorted(self.settings.agm, reverse=True):
            found = self.guides[0](stage, features[self.taps_a[stage]]).float()
            above = maps[stage] = self.coam[str(stage)](found, above) if stage in self.settings.coam else found
        return maps

    def _segment(self, shared: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Branch B: the features of all its taps from the shared one on, and its logits."""
        entering = self.adapter(shared)
        features = {self.settings.shared[1]: entering, **_run(self.segmentation, entering)}
        return features, self.masks(list(features.values())[-1]).float()

    def _seeded(self, logits: Tensor, maps: Tensor, images: Tensor, tags: Tensor, stage: int) -> Tensor:
        """The balanced seeding loss of one pair of branches."""
        settings = self.settings
        size = (images.shape[2], images.shape[3])
        if settings.loss_size == "output":
            size = (logits.shape[2], logits.shape[3])
        elif logits.shape[2:] != size:
            logits = functional.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
        delta = settings.delta[(*STAGES, FINAL).index(stage)]
        labels = online_labels(maps, tags, size, delta, settings.background_power, settings.confident)
        return seeding_loss(logits, labels.masked_fill(~inside(images, size), IGNORE))


def _run(backbone: Backbone, x: Tensor, start: str | None = None, end: str | None = None) -> dict[str, Tensor]:
    """The features of every tap after ``start``, whose features ``x`` is, up to ``end``; None: of all stages held."""
    names = list(backbone.stages)
    first = 0 if start is None else names.index(start) + 1
    last = len(names) if end is None else names.index(end) + 1
    found = {}
    for name in names[first:last]:
        found[name] = x = backbone.stages[name](x)
    return found


def _listed(stages: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(stages)))


def _entries(a: Backbone, b: Backbone, settings: Agen.Settings) -> tuple[Tap, Tap]:
    """What the two taps of ``settings.shared`` give.

    Raises:
        PipelineError: a tap does not exist or is the last one, or their strides differ.
    """
    for key, name, backbone in zip(("classification", "segmentation"), settings.shared, (a, b), strict=True):
        choices = list(backbone.taps)[:-1]
        if name not in choices:
            raise PipelineError(f"shared: {name} is no tap of the {key} backbone; choose from {', '.join(choices)}")
    one, other = a.taps[settings.shared[0]], b.taps[settings.shared[1]]
    if one.stride != other.stride:
        raise PipelineError(
            f"shared: {settings.shared[0]} has stride {one.stride} and {settings.shared[1]} {other.stride};"
            " name taps of one stride"
        )
    return one, other


def _stage_taps(backbone: Backbone, shared: str, named: Sequence[str] | None, key: str) -> dict[int, str]:
    """By stage, the tap whose features its AGM takes: as named, else the three after the shared one or the last three.

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
