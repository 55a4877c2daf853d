"""What may stand in params.yaml: one dataclass a block, each key with its meaning.

``pipeline.config.params`` reads a file into these and refuses anything else. Ranges stand beside the numbers;
contradictions among the keys of one block are reported by its ``faults``. The settings of a method or network
stand in its own file, and a block names it (``pipeline.config.registry``).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pipeline.config.reader import Count, NonNegative, NonNegativeInt, Positive, Range, Share
from pipeline.config.registry import BACKBONES, METHODS, ONE_STEP, REFINEMENTS, RULES, SEGMENTATIONS, Choice, Name


@dataclass(frozen=True)
class Demo:
    """The generated dataset: images and their exact masks, in VOC layout."""

    train: Count = 600
    evaluation: Count = 150
    size: Annotated[int, Range(least=24)] = 96  # side in pixels; the shapes in it grow with it
    seed: NonNegativeInt = 0  # of the images, not of the training


MAKERS = ("demo", "download", "coco_stuff")


@dataclass(frozen=True)
class Dataset:
    """A folder in VOC layout. ``root``, ``extra`` and ``coco_stuff`` are relative to the working folder, all else to
    ``root``."""

    root: str
    classes: str = "voc"  # 'voc', or a text file with one class name a line
    tags: str = "tags.json"  # .json, .csv, .npy, .txt, or a folder of XML annotations
    images: str = "JPEGImages"
    masks: str | None = None  # only ever read to evaluate and for supervised rows
    train: str = "ImageSets/Segmentation/train.txt"
    evaluation: str = "ImageSets/Segmentation/val.txt"
    extra: str | None = None  # more training images, a folder a class, whose name is the single tag (EDAM Sec. 4.4)
    demo: Demo | None = None  # generate the dataset at root
    download: Literal["voc2012_aug"] | None = None  # or download it there
    coco_stuff: str | None = None  # or make it there of COCO-Stuff 10k v1.1, which lies unpacked here (EDAM Sec. 4.6)

    @property
    def makers(self) -> list[str]:
        """The stages that are to make the dataset at ``root``: none, or one."""
        return [key for key in MAKERS if getattr(self, key)]

    def faults(self) -> Iterator[str]:
        if len(self.makers) > 1:
            one, other = self.makers[:2]
            yield f"{one}: makes the dataset, and so does {other}; set one of the two to null"
        if self.coco_stuff and Path(self.root).is_relative_to(self.coco_stuff):
            yield f"root: lies in {self.coco_stuff}, of which it is made (coco_stuff); choose a folder outside of it"


@dataclass(frozen=True)
class Saliency:
    """Where saliency maps come from. ``folder``: grey PNG, same stem and size as the images; ``store``: an HDF5 raster
    store; ``spectral_residual`` and ``fine_grained``: OpenCV's detectors, which need no weights."""

    kind: Literal["folder", "store", "spectral_residual", "fine_grained", "none"]
    path: str | None = None

    def faults(self) -> Iterator[str]:
        if self.kind in ("folder", "store") and self.path is None:
            yield f"path: is missing; saliency.kind {self.kind} needs it"


@dataclass(frozen=True)
class Backbone:
    """A feature extractor. ``weights``: 'imagenet' (torchvision's, downloaded), null, or a file: a state dict in
    torchvision's layout (a segmentation network's, trained on COCO, too), or the model.pt of another run."""

    name: Annotated[str, Name(BACKBONES)]
    output_stride: Literal[4, 8, 16, 32] = 8
    dilated: bool = True  # layers after a removed stride are dilated instead
    weights: str | None = None
    frozen_batch_norm: bool = False  # keep statistics and affine parameters as loaded
    frozen: tuple[str, ...] = ()  # the first taps: their stages stay as loaded, batch norms included

    def faults(self) -> Iterator[str]:
        if self.frozen and self.weights is None:
            yield "frozen: would keep random weights; name weights, or freeze nothing"

    def describe(self) -> str:
        """For the report, such as 'vgg16 from ImageNet weights'."""
        start = {None: "random", "imagenet": "ImageNet"}.get(self.weights) or Path(self.weights or "").name
        return f"{self.name} from {start} weights"


def backbones(block: object) -> dict[str, Backbone]:
    """The backbones of a block by key: 'backbone', or 'backbones.NAME' where it has several."""
    found: dict[str, Backbone] = {}
    for key, value in vars(block).items():
        parts = {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, Mapping) else {key: value}
        found |= {name: part for name, part in parts.items() if isinstance(part, Backbone)}
    return found


def without_weights(block: Any) -> Any:
    """The block with backbones that start from random weights."""

    def bare(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: bare(item) for name, item in value.items()}
        return replace(value, weights=None) if isinstance(value, Backbone) else value

    return replace(block, **{key: bare(value) for key, value in vars(block).items()})


@dataclass(frozen=True)
class Head:
    """``convs`` 3x3 convolutions of ``channels`` with ReLU, then the 1x1 class-aware convolution."""

    convs: NonNegativeInt = 3
    channels: Count = 512


@dataclass(frozen=True)
class Training:
    """How any network is trained. Milestones count epochs, or iterations where ``iterations`` is given."""

    batch_size: Count
    lr: Positive
    epochs: Count | None = None
    iterations: Count | None = None  # optimizer steps; exactly one of epochs and iterations
    accumulation: Count = 1  # batches an optimizer step
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: Annotated[float, Range(least=0, below=1)] = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 5e-4
    decay_biases: bool = True
    lr_bias: NonNegative = 2.0  # multiplier for biases
    lr_new: NonNegative = 10.0  # multiplier for the layers added to the backbone; of their biases: lr_new * lr_bias
    schedule: Literal["constant", "step", "poly"] = "step"
    milestones: tuple[NonNegative, ...] = ()
    gamma: Positive = 0.1
    power: NonNegative = 0.9
    hold: Count = 1  # optimizer steps between two changes of the rate (DeepLab-v2: 10)
    warmup: NonNegativeInt = 0  # optimizer steps with linearly growing learning rate
    warmup_start: Share = 0.0  # share of the rate that it grows from
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the processor has it

    def faults(self) -> Iterator[str]:
        if (self.epochs is None) == (self.iterations is None):
            yield ": give either epochs or iterations"
        if self.nesterov and self.optimizer == "sgd" and self.momentum == 0:
            yield "nesterov: needs a momentum; set momentum above 0, or nesterov to false"


@dataclass(frozen=True)
class Augmentation:
    """From a stored image to a training input, in this order: resize, scale, flip, jitter, crop."""

    side: Literal["short", "long", "square", "none"] = "none"  # which side gets ``length``; square: both
    length: tuple[Count, Count] | None = None  # pixels, drawn uniformly from [low, high]
    scale: tuple[Positive, Positive] | None = None  # factor, drawn uniformly from [low, high]
    flip: bool = True
    # Of brightness, contrast and saturation: x draws a factor from [1 - x, 1 + x]; of the hue: a shift from [-x, x]
    jitter: tuple[NonNegative, NonNegative, NonNegative, Annotated[float, Range(least=0, most=0.5)]] | None = None
    crop: Count | None = None  # side of a random square crop, padded where the image is smaller

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

    fusion: Literal["max", "average"] = "max"  # OAA Eq. 5 or Eq. 10
    gate: Literal["top_n", "strict", "none"] = "top_n"  # rank within the number of tags; above all non-targets
    skip_epochs: NonNegativeInt = 1  # epochs before accumulation begins; the last one always accumulates
    cells: Count = 28  # cells on the short side of a stored map
    snapshots: bool = False  # keep the maps of every epoch, for the attention evolution curve (OAA Fig. 11)


@dataclass(frozen=True)
class AttentionDrop:
    """The attention drop layer (OAA Alg. 1)."""

    target: Literal["image", "features"] = "image"
    beta: Share = 0.5  # probability that a sample is occluded
    delta: Share = 0.6  # attention above which it is occluded


@dataclass(frozen=True)
class Suppression:
    """Discriminative region suppression (DRS Alg. 1), plugged into the layers of a classifier."""

    # Share of a channel's maximum that is left (the non-learnable controller); 0: learnable
    delta: Annotated[float, Range(least=0, below=1)] = 0.0
    layers: tuple[str, ...] | None = None  # taps of the backbone, and 'head'; null: all of them

    def describe(self) -> str:
        """For the report, such as 'DRS, delta 0.55, in conv6, head'."""
        kind = f"DRS, delta {self.delta:g}" if self.delta else "DRS, learnable"
        return kind if self.layers is None else f"{kind}, in {', '.join(self.layers) or 'no layer'}"


@dataclass(frozen=True)
class Classifier:
    """An image-level classifier whose class-aware maps locate objects."""

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
    """A network trained on maps."""

    source: str  # classifiers/NAME (cumulative attention), localizations/NAME or walks/NAME
    backbone: Backbone
    training: Training
    network: Annotated[Choice, REFINEMENTS] = field(default_factory=lambda: Choice(REFINEMENTS, "integral"))
    head: Head = field(default_factory=Head)
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True)
class Climbing:
    """Anti-adversarial climbing (AdvCAM): the image is changed step by step so that its tag's score grows, and the maps
    of all steps are added up. AMR's public numbers contain it, its paper does not name it."""

    iterations: NonNegativeInt = 27
    step: Positive = 0.08  # by which a step changes the value it changes most, in units of the normalised input
    weight: NonNegative = 7.0  # of the term that holds back what is attended already
    threshold: Share = 0.5  # share of a map's maximum above which a place counts as attended already


@dataclass(frozen=True)
class Localization:
    """Localization maps of a trained classifier, refinement or one-step network."""

    model: str  # classifiers/NAME, refinements/NAME or one_step/NAME
    side: Literal["short", "long", "square", "none"] = "none"
    length: Count | None = None  # pixels
    scales: tuple[Positive, ...] = (1.0,)
    flip: bool = False
    fusion: Literal["mean", "max"] = "mean"
    normalise: Literal["max", "none"] = "max"  # divide by the maximum; or cut at 1, for networks that regress values
    stride: Count = 4  # image pixels a stored cell
    climbing: Climbing | None = None  # of a classifier

    def faults(self) -> Iterator[str]:
        if self.side != "none" and self.length is None:
            yield f"length: is missing; side {self.side} needs it"
        if not self.scales:
            yield "scales: is empty; name one at least"
        if self.climbing is not None and not self.model.startswith("classifiers/"):
            yield f"climbing: {self.model} is no classifier; set climbing to null"


@dataclass(frozen=True)
class Affinity:
    """The affinity branch of the inter-pixel relation network (IRN): edges, learned from confident labels."""

    labels: str  # pseudo_labels/NAME, of which only 255 is not learned from; rule: confident makes such labels
    backbone: Backbone
    training: Training
    frozen_backbone: bool = True  # only the branch learns (IRN's code); one without trained weights has to learn, too
    channels: Annotated[int, Range(least=4)] = 32  # of each level's edge features
    radius: Annotated[int, Range(least=2)] = 10  # cells: pairs that are nearer are compared
    augmentation: Augmentation = field(default_factory=Augmentation)

    def faults(self) -> Iterator[str]:
        if self.channels % 4:
            yield f"channels: {self.channels} is no multiple of 4, the groups of its norms"


@dataclass(frozen=True)
class Walk:
    """Maps spread by a random walk along the affinities (PSA, IRN)."""

    affinity: str  # affinities/NAME
    maps: str  # classifiers/NAME (cumulative attention), localizations/NAME or walks/NAME
    # Cells: a step leads to those that are nearer; at 5 each cell begins 34 pairs
    radius: Annotated[int, Range(least=2)] = 5
    beta: Positive = 10.0  # power of the affinities
    times: NonNegativeInt = 8  # the walk has 2^times steps
    power: Positive = 1.0  # of the maps before the walk (AMR: 1.5)
    edge_weighting: bool = True  # maps times (1 - edge) before the walk


@dataclass(frozen=True)
class Crf:
    """Dense CRF; sigmas in pixels and grey levels."""

    iterations: NonNegativeInt = 10
    gaussian_xy: Positive = 3.0
    gaussian_weight: NonNegative = 3.0
    bilateral_xy: Positive = 67.0
    bilateral_rgb: Positive = 3.0
    bilateral_weight: NonNegative = 4.0


@dataclass(frozen=True)
class PseudoLabels:
    """From maps to label maps: see ``pipeline.labels``."""

    source: str  # classifiers/NAME (cumulative attention), localizations/NAME or walks/NAME
    rule: Annotated[Choice, RULES]
    normalise: Literal["minmax", "max", "none"] = "minmax"  # stretch each map from its own range or maximum to 1


@dataclass(frozen=True)
class Mixture:
    """Pseudo labels in which a share of the training images, drawn among those with masks, have their masks instead
    (OAA Table 7)."""

    labels: str
    share: Share


@dataclass(frozen=True)
class Segmentation:
    """A segmentation network trained on label maps."""

    # pseudo_labels/NAME, mixtures/NAME, or ground_truth: the supervised upper bound, of the training images with masks
    labels: str
    network: Annotated[Choice, SEGMENTATIONS]
    backbone: Backbone
    training: Training
    augmentation: Augmentation = field(default_factory=Augmentation)
    loss_size: Literal["input", "output"] = "input"  # logits upsampled to the labels; or labels (nearest) to the logits
    self_training: bool = False  # also learn the network's own labels among the image's tags (DRS's public code)


@dataclass(frozen=True)
class OneStep:
    """A network that learns masks from tags in one training."""

    network: Annotated[Choice, ONE_STEP]
    backbones: dict[str, Backbone]  # by the names that the network gives them; null removes one of ``defaults``
    training: Training
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True)
class Test:
    """How every segmentation network is tested: one protocol for all rows."""

    scales: tuple[Positive, ...] = (1.0,)
    flip: bool = False
    crf: Crf | None = None

    def faults(self) -> Iterator[str]:
        if not self.scales:
            yield "scales: is empty; name one at least"


@dataclass(frozen=True)
class Params:
    """The whole of params.yaml, defaults merged into the blocks."""

    experiment: str  # results/EXPERIMENT holds the outputs
    seed: NonNegativeInt
    method: str  # the row whose numbers metrics.json carries
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
    test: Test = field(default_factory=Test)
    gallery: NonNegativeInt = 12  # images in the report
    # These rows alone, and the blocks that they are derived from; null: all
    rows: tuple[str, ...] | None = None
