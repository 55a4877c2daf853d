"""The schema of params.yaml: one dataclass per block, with a comment on each key.

``pipeline.config.params`` reads params files into these classes and rejects anything else. Annotations give the range
of each number, and the ``faults`` of a block report inconsistencies among its keys. The settings of a method or
network are defined in its own file; a block refers to it by name (``pipeline.config.registry``). The blocks that
describe images and maps are in ``pipeline.config.dataset`` and ``pipeline.config.views``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pipeline.config.dataset import Dataset, Saliency
from pipeline.config.reader import (
    Count,
    FilePath,
    FolderName,
    NonNegative,
    NonNegativeInt,
    Positive,
    Range,
    Scale,
    Share,
)
from pipeline.config.registry import (
    BACKBONES,
    EXECUTION,
    METHODS,
    ONE_STEP,
    REFINEMENTS,
    RULES,
    SEGMENTATIONS,
    Choice,
    Name,
)
from pipeline.config.tables import Table
from pipeline.config.views import Boxes, BoxTest, Localization


@dataclass(frozen=True)
class Backbone:
    """A feature extractor and its initial weights.

    ``name`` may be 'timm:NAME' for a network of timm (``pipeline.networks.timm_backbone``).

    ``weights`` is 'imagenet' (downloaded from torchvision, or the default weights of a network of timm), null (random),
    or a file: a state dict in torchvision's or timm's layout (of a classifier or a segmentation network), which may be
    wrapped as {'state_dict': ...} and have prefixes such as 'module.', or the model.pt of another run.
    """

    name: Annotated[str, Name(BACKBONES)]
    output_stride: Literal[4, 8, 16, 32] = 8
    dilated: bool = True  # dilate the layers that follow a removed stride
    weights: FilePath | None = None
    frozen_batch_norm: bool = False  # keep the loaded statistics and affine parameters
    frozen: tuple[str, ...] = ()  # the first taps, whose stages keep the loaded parameters and statistics

    def faults(self) -> Iterator[str]:
        if self.frozen and self.weights is None:
            yield "frozen: would freeze random weights; set weights, or freeze nothing"

    def describe(self) -> str:
        """Describe the backbone for the report, such as 'vgg16 from ImageNet weights'."""
        start = {None: "random", "imagenet": "ImageNet"}.get(self.weights) or Path(self.weights or "").name
        return f"{self.name} from {start} weights"


def backbones(block: object) -> dict[str, Backbone]:
    """Return the backbones of a block by key: 'backbone', or 'backbones.NAME' if it has several."""
    result: dict[str, Backbone] = {}
    for key, value in vars(block).items():
        parts = {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, Mapping) else {key: value}
        result |= {name: part for name, part in parts.items() if isinstance(part, Backbone)}
    return result


def without_weights(block: Any) -> Any:
    """Copy the block with ``weights`` of its backbones set to null, since a checkpoint replaces them."""

    def bare(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: bare(item) for name, item in value.items()}
        return replace(value, weights=None) if isinstance(value, Backbone) else value

    return replace(block, **{key: bare(value) for key, value in vars(block).items()})


@dataclass(frozen=True)
class Head:
    """A head of ``convs`` 3x3 convolutions with ``channels`` and ReLU, then a 1x1 convolution to one map per class."""

    convs: NonNegativeInt = 3
    channels: Count = 512
    batch_norm: bool = False  # before each ReLU; a network that trains from scratch learns in half of the steps


@dataclass(frozen=True)
class Training:
    """Training settings of a network. Milestones are in iterations if ``iterations`` is set, otherwise in epochs."""

    batch_size: Count
    lr: Positive
    epochs: Count | None = None
    iterations: Count | None = None  # optimizer steps; exactly one of epochs and iterations
    accumulation: Count = 1  # batches per optimizer step
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: Annotated[float, Range(least=0, below=1)] = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 5e-4
    decay_biases: bool = True
    lr_bias: NonNegative = 2.0  # factor of the rate for biases
    lr_new: NonNegative = 10.0  # factor for the layers added to the backbone; their biases get lr_new * lr_bias
    schedule: Literal["constant", "step", "poly"] = "step"
    milestones: tuple[NonNegative, ...] = ()
    gamma: Positive = 0.1
    power: NonNegative = 0.9
    hold: Count = 1  # optimizer steps between changes of the rate (DeepLab-v2: 10)
    warmup: NonNegativeInt = 0  # optimizer steps over which the rate grows linearly
    warmup_start: Share = 0.0  # fraction of the rate at which the warmup starts
    # Also of localization, walk and prediction with this network. auto: bf16 if the device supports it
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # Processes, each on a GPU of its own, that share every batch; also of the inference with this network. It is an
    # execution option: it changes the order of sums alone, and no result becomes outdated by it.
    processes: Count = field(default=1, metadata=EXECUTION)

    def faults(self) -> Iterator[str]:
        if self.batch_size % self.processes:
            yield f"processes: batch_size {self.batch_size} is not a multiple of {self.processes}; change either"
        if (self.epochs is None) == (self.iterations is None):
            yield ": set either epochs or iterations, not both"
        if self.nesterov and self.optimizer == "sgd" and self.momentum == 0:
            yield "nesterov: needs a momentum; set momentum above 0, or nesterov to false"

    def on_share(self, share: float) -> "Training":
        """Return the settings with which a training on this share of the images takes as many steps as on all."""
        if share == 1 or self.epochs is None:
            return self
        milestones = tuple(round(epoch / share) for epoch in self.milestones)
        return replace(self, epochs=max(1, round(self.epochs / share)), milestones=milestones)


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images, applied in this order: resize, scale, flip, jitter, crop."""

    side: Literal["short", "long", "square", "none"] = "none"  # the side that is resized to ``length``; square: both
    length: tuple[Count, Count] | None = None  # pixels, drawn uniformly from [low, high]
    scale: tuple[Scale, Scale] | None = None  # factor, drawn uniformly from [low, high]
    flip: bool = True
    # Brightness, contrast, saturation: a factor drawn from [1 - x, 1 + x]; hue: a shift drawn from [-x, x]
    jitter: tuple[NonNegative, NonNegative, NonNegative, Annotated[float, Range(least=0, most=0.5)]] | None = None
    crop: Count | None = None  # side of a random square crop; smaller images are padded

    def faults(self) -> Iterator[str]:
        if self.side != "none" and self.length is None:
            yield f"length: is missing; side {self.side} needs it"
        for key in ("length", "scale"):
            bounds = getattr(self, key)
            if bounds and bounds[0] > bounds[1]:
                yield f"{key}: {list(bounds)} must be [low, high]"


@dataclass(frozen=True)
class Accumulate:
    """Online attention accumulation (OAA Sec. 3.2)."""

    fusion: Literal["max", "average"] = "max"  # OAA Eq. 5 (max) or Eq. 10 (average)
    gate: Literal["top_n", "strict", "none"] = "top_n"  # rank within the number of tags; or above all non-targets
    skip_epochs: NonNegativeInt = 1  # epochs before accumulation starts; the last epoch always accumulates
    cells: Count = 28  # cells on the short side of a stored map
    snapshots: bool = False  # save the maps of every epoch for the attention evolution curve (OAA Fig. 11)


@dataclass(frozen=True)
class AttentionDrop:
    """The attention drop layer (OAA Alg. 1)."""

    target: Literal["image", "features"] = "image"
    beta: Share = 0.5  # probability that a sample is occluded
    delta: Share = 0.6  # attention above which pixels are occluded


@dataclass(frozen=True)
class Suppression:
    """Discriminative region suppression (DRS Alg. 1) in the layers of a classifier."""

    # Upper bound as a fraction of a channel's maximum (the non-learnable controller); 0: learnable
    delta: Annotated[float, Range(least=0, below=1)] = 0.0
    # Taps of the backbone and 'head', or slices of all of these from shallow to deep, such as '-2:'; null: all
    layers: tuple[str, ...] | None = None

    def describe(self) -> str:
        """Describe the suppression for the report, such as 'DRS, delta 0.55, in conv6, head'."""
        kind = f"DRS, delta {self.delta:g}" if self.delta else "DRS, learnable"
        return kind if self.layers is None else f"{kind}, in {', '.join(self.layers) or 'no layer'}"


@dataclass(frozen=True)
class Classifier:
    """An image-level classifier whose class activation maps localize objects."""

    backbone: Backbone
    training: Training
    method: Annotated[Choice, METHODS] = field(default_factory=lambda: Choice(METHODS, "cam"))
    head: Head = field(default_factory=Head)
    augmentation: Augmentation = field(default_factory=Augmentation)
    accumulate: Accumulate = field(default_factory=Accumulate)
    attention_drop: AttentionDrop | None = None
    suppression: Suppression | None = None


@dataclass(frozen=True)
class Refinement:
    """A refinement network that is trained to regress maps."""

    source: str  # classifiers/NAME (cumulative attention), localizations/NAME or walks/NAME
    backbone: Backbone
    training: Training
    network: Annotated[Choice, REFINEMENTS] = field(default_factory=lambda: Choice(REFINEMENTS, "integral"))
    head: Head = field(default_factory=Head)
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True)
class Affinity:
    """The boundary branch of the inter-pixel relation network (IRN), trained on confident labels."""

    labels: str  # pseudo_labels/NAME; only 255 is ignored, so use rule: confident
    backbone: Backbone
    training: Training
    frozen_backbone: bool = True  # train only the branch (IRN's code); random backbones must be trained too
    channels: Annotated[int, Range(least=4)] = 32  # edge features per level
    radius: Annotated[int, Range(least=2)] = 10  # cells; pairs at a smaller distance are compared
    # inner: without the pairs that begin in the last radius - 1 rows, or in the first or last radius - 1 columns (IRN's
    # code). Such pairs reach beyond the grid in some direction
    pairs: Literal["all", "inner"] = "all"
    augmentation: Augmentation = field(default_factory=Augmentation)

    def faults(self) -> Iterator[str]:
        if self.channels % 4:
            yield f"channels: {self.channels} is not a multiple of 4, the number of groups of its group norms"


@dataclass(frozen=True)
class Walk:
    """Propagation of maps by a random walk over the affinities (PSA, IRN)."""

    affinity: str  # affinities/NAME
    maps: str  # classifiers/NAME (cumulative attention), localizations/NAME or walks/NAME
    # Cells; a step reaches cells at a smaller distance. With 5, each cell is the first of 34 pairs
    radius: Annotated[int, Range(least=2)] = 5
    beta: Positive = 10.0  # exponent of the affinities
    times: Annotated[int, Range(least=0, most=20)] = 8  # the walk has 2^times steps
    power: Positive = 1.0  # exponent of the maps before the walk (AMR: 1.5)
    edge_weighting: bool = True  # multiply the maps by (1 - edge) before the walk
    # The grid on which the maps are divided by their maximum and stored; pixels: those of the image, to which they are
    # upsampled first (IRN's code); takes 16 times the space
    grid: Literal["cells", "pixels"] = "cells"


# With widths near 0, pydensecrf computes addresses outside of its lattice; with huge weights its output is NaN.
CrfWidth = Annotated[float, Range(least=0.01)]
CrfWeight = Annotated[float, Range(least=0, most=1e6)]


@dataclass(frozen=True)
class Crf:
    """Parameters of the dense CRF. The standard deviations are in pixels (xy) and intensity levels 0..255 (rgb)."""

    iterations: NonNegativeInt = 10
    gaussian_xy: CrfWidth = 3.0
    gaussian_weight: CrfWeight = 3.0
    bilateral_xy: CrfWidth = 67.0
    bilateral_rgb: CrfWidth = 3.0
    bilateral_weight: CrfWeight = 4.0


@dataclass(frozen=True)
class PseudoLabels:
    """Pseudo labels that a rule derives from maps; see ``pipeline.labels``."""

    source: str  # classifiers/NAME (cumulative attention), localizations/NAME or walks/NAME
    rule: Annotated[Choice, RULES]
    normalise: Literal["minmax", "max", "none"] = "minmax"  # scale each map to 1 by its range or its maximum


@dataclass(frozen=True)
class Mixture:
    """Pseudo labels in which the masks replace the labels of some images (OAA Table 7).

    ``share`` is a fraction of all training images. The images are drawn from those that have masks.
    """

    labels: str
    share: Share


@dataclass(frozen=True)
class Segmentation:
    """A segmentation network trained on label maps."""

    # pseudo_labels/NAME, mixtures/NAME, or ground_truth (the supervised upper bound, on the images with masks)
    labels: str
    network: Annotated[Choice, SEGMENTATIONS]
    backbone: Backbone
    training: Training
    augmentation: Augmentation = field(default_factory=Augmentation)
    # Upsample the logits to the labels (input), or reduce the labels to the logits (output, nearest)
    loss_size: Literal["input", "output"] = "input"
    self_training: bool = False  # add a loss on the network's own predictions, restricted to the tags (DRS's code)
    # Share of the images that the network trains on, drawn with the seed (OAA Table 7). It takes as many steps as with
    # all images
    share: Annotated[float, Range(above=0, most=1)] = 1.0


@dataclass(frozen=True)
class OneStep:
    """A network that learns to predict masks from tags in a single training."""

    network: Annotated[Choice, ONE_STEP]
    backbones: dict[str, Backbone]  # keys are defined by the network; null removes one that ``defaults`` has
    training: Training
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True)
class Test:
    """The test protocol of all segmentation networks."""

    scales: tuple[Scale, ...] = (1.0,)
    flip: bool = False
    crf: Crf | None = None

    def faults(self) -> Iterator[str]:
        if not self.scales:
            yield "scales: is empty; add at least one"


@dataclass(frozen=True)
class Params:
    """All of params.yaml, with defaults merged into the blocks."""

    experiment: FolderName  # the outputs go to results/EXPERIMENT
    seed: NonNegativeInt  # of the trainings
    method: str  # the row whose scores go to metrics.json
    dataset: Dataset
    saliency: Saliency
    classifiers: dict[str, Classifier]
    pseudo_labels: dict[str, PseudoLabels]
    segmentations: dict[str, Segmentation]
    one_step: dict[str, OneStep] = field(default_factory=dict)
    refinements: dict[str, Refinement] = field(default_factory=dict)
    localizations: dict[str, Localization] = field(default_factory=dict)
    affinities: dict[str, Affinity] = field(default_factory=dict)
    walks: dict[str, Walk] = field(default_factory=dict)
    mixtures: dict[str, Mixture] = field(default_factory=dict)
    boxes: dict[str, Boxes] = field(default_factory=dict)
    test: Test = field(default_factory=Test)
    box_test: BoxTest = field(default_factory=BoxTest)
    gallery: NonNegativeInt = 12  # images in the report
    # Run only these rows and the blocks that they and ``boxes`` are derived from; null: all rows; []: boxes alone
    rows: tuple[str, ...] | None = None
    # Run these rows before the others, and report on them as soon as they are done; rows that do not run are left out
    first: tuple[str, ...] = ()
    # The papers' tables: if there are any, their rows run instead, as far as the tables score them, and
    # results/EXPERIMENT/tables/NAME holds a report on each. ``rows`` then restricts them
    tables: dict[str, Table] = field(default_factory=dict)
    # Run all rows with each of these seeds, one of which is ``seed``; null: with ``seed`` alone. Outputs of seed N that
    # depend on it go to results/EXPERIMENT/seed_N, those of ``seed`` to results/EXPERIMENT.
    seeds: tuple[NonNegativeInt, ...] | None = None

    @property
    def further_seeds(self) -> tuple[int, ...]:
        """The seeds other than ``seed``."""
        return tuple(seed for seed in self.seeds or () if seed != self.seed)

    @property
    def every_seed(self) -> tuple[int, ...]:
        """All seeds, ``seed`` first."""
        return (self.seed, *self.further_seeds)
