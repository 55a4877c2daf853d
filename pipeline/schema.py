"""What may stand in params.yaml: one dataclass a block, each key with its meaning.

``pipeline.params`` reads a file into these and refuses anything else. A new method's block is added here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipeline.reader import Share
from pipeline.registry import BACKBONES, RULES, SEGMENTATIONS, Choice, Name


@dataclass(frozen=True)
class Demo:
    """The generated dataset: images and their exact masks, in VOC layout."""

    train: int = 600
    evaluation: int = 150
    size: int = 96  # side in pixels
    seed: int = 0  # of the images, not of the training


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


@dataclass(frozen=True)
class Saliency:
    """Where saliency maps come from. ``folder``: grey PNG, same stem and size as the images; ``store``: an HDF5 raster
    store; ``spectral_residual`` and ``fine_grained``: OpenCV's detectors, which need no weights."""

    kind: Literal["folder", "store", "spectral_residual", "fine_grained", "none"]
    path: str | None = None


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


def backbones(block: object) -> dict[str, Backbone]:
    """The backbones among a block's values, by key."""
    return {key: value for key, value in vars(block).items() if isinstance(value, Backbone)}


@dataclass(frozen=True)
class Head:
    """``convs`` 3x3 convolutions of ``channels`` with ReLU, then the 1x1 class-aware convolution."""

    convs: int = 3
    channels: int = 512


@dataclass(frozen=True)
class Training:
    """How any network is trained. Milestones count epochs, or iterations where ``iterations`` is given."""

    batch_size: int
    lr: float
    epochs: int | None = None
    iterations: int | None = None  # optimizer steps; exactly one of epochs and iterations
    accumulation: int = 1  # batches an optimizer step
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay_biases: bool = True
    lr_bias: float = 2.0  # multiplier for biases
    lr_new: float = 10.0  # multiplier for the layers added to the backbone; of their biases: lr_new * lr_bias
    schedule: Literal["constant", "step", "poly"] = "step"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    power: float = 0.9
    hold: int = 1  # optimizer steps between two changes of the rate (DeepLab-v2: 10)
    warmup: int = 0  # optimizer steps with linearly growing learning rate
    warmup_start: float = 0.0  # share of the rate that it grows from
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the processor has it


@dataclass(frozen=True)
class Augmentation:
    """From a stored image to a training input, in this order: resize, scale, flip, jitter, crop."""

    side: Literal["short", "long", "square", "none"] = "none"  # which side gets ``length``; square: both
    length: tuple[int, int] | None = None  # pixels, drawn uniformly from [low, high]
    scale: tuple[float, float] | None = None  # factor, drawn uniformly from [low, high]
    flip: bool = True
    jitter: tuple[float, float, float, float] | None = None  # brightness, contrast, saturation, hue
    crop: int | None = None  # side of a random square crop, padded where the image is smaller


@dataclass(frozen=True)
class Accumulate:
    """Online attention accumulation (OAA Sec. 3.2)."""

    fusion: Literal["max", "average"] = "max"  # OAA Eq. 5 or Eq. 10
    gate: Literal["top_n", "strict", "none"] = "top_n"  # rank within the number of tags; above all non-targets
    skip_epochs: int = 1  # epochs before accumulation begins; the last one always accumulates
    cells: int = 28  # cells on the short side of a stored map
    snapshots: bool = False  # keep the maps of every epoch, for the attention evolution curve (OAA Fig. 11)


@dataclass(frozen=True)
class AttentionDrop:
    """The attention drop layer (OAA Alg. 1)."""

    target: Literal["image", "features"] = "image"
    beta: float = 0.5  # probability that a sample is occluded
    delta: float = 0.6  # attention above which it is occluded


@dataclass(frozen=True)
class Suppression:
    """Discriminative region suppression (DRS Alg. 1), plugged into the layers of a classifier."""

    delta: float = 0.0  # what of a channel's maximum is left (the non-learnable controller); 0: learnable
    layers: tuple[str, ...] | None = None  # taps of the backbone, and 'head'; null: all of them


@dataclass(frozen=True)
class Amr:
    """Activation modulation and recalibration (AMR): its modules and its joint training."""

    channel: bool = True  # channel attention modulation in the compensation branch (Table 3: AMM_c)
    spatial: bool = True  # spatial attention modulation (AMM_s)
    layers: tuple[str, ...] | None = None  # taps of the backbone whose layers are modulated; null: all (the code)
    # Of the modulation (Table 4); density: a Gaussian of the density's height, 1 / (sqrt(2 pi) sigma) (the code)
    function: Literal["gaussian", "density", "threshold"] = "gaussian"
    statistics: Literal["sample", "batch"] = "sample"  # what the Gaussian's mean and deviation are taken over
    reduction: int = 16  # channels over those between the two linear layers of the channel modulation
    consistency: float = 0.05  # weight of cross pseudo supervision, L_cps (the code; the paper: 1); 0: none
    xi: float = 0.5  # share of the spotlight branch in the recalibrated maps (Table 5)
    shared: Literal["nothing", "stem"] = "nothing"  # what both branches have in common


@dataclass(frozen=True)
class Edam:
    """The discriminative activation layer and the collaborative multi-attention module (EDAM). They take the place of
    the classifier's ``head``; ``training.batch_size`` is a multiple of ``group``."""

    channels: int = 128  # of the class-specific activation maps, the width of the attention
    heads: int = 2
    hidden: int = 512  # of the feed-forward layer
    dropout: float = 0.1
    collaborative: bool = True  # the collaborative multi-attention module; without it, plain pooling (Table 5)
    group: int = 2  # images that attend to each other, 1 to 4 (Table 6)
    pairing: Literal["shared_class", "random"] = "shared_class"  # what a group's images have in common


@dataclass(frozen=True)
class Classifier:
    """An image-level classifier whose class-aware maps locate objects."""

    backbone: Backbone
    training: Training
    method: Literal["cam", "amr", "edam"] = "cam"
    head: Head = field(default_factory=Head)
    augmentation: Augmentation = field(default_factory=Augmentation)
    accumulate: Accumulate = field(default_factory=Accumulate)
    attention_drop: AttentionDrop | None = None
    suppression: Suppression | None = None
    amr: Amr | None = None  # of method amr; null: its defaults
    edam: Edam | None = None  # of method edam; null: its defaults


@dataclass(frozen=True)
class Refinement:
    """A network trained on maps. ``integral``: the integral attention model (OAA Sec. 3.4); ``regression``:
    localization map refinement learning (DRS Sec. "Localization Map Refinement Learning")."""

    source: str  # classifiers/NAME (cumulative attention), localizations/NAME or walks/NAME
    backbone: Backbone
    training: Training
    kind: Literal["integral", "regression"] = "integral"
    head: Head = field(default_factory=Head)
    augmentation: Augmentation = field(default_factory=Augmentation)
    loss: Literal["hybrid", "cross_entropy", "enhance"] = "hybrid"  # OAA Eq. 9, 6, 7 (Table 4: HL, MCE, EP)
    # integral: mean per class, summed (paper), or all tagged classes pooled (code); regression: the mean over all
    # classes (paper and code), or over the tagged ones
    reduction: Literal["class", "pooled"] = "class"
    threshold: float = 0.0  # attention above which a pixel belongs to N+ (OAA Table 5)
    target: Literal["strongest", "full"] = "strongest"  # of regression: a pixel's strongest class (code); all (paper)


@dataclass(frozen=True)
class Climbing:
    """Anti-adversarial climbing (AdvCAM): the image is changed step by step so that its tag's score grows, and the maps
    of all steps are added up. AMR's public numbers contain it, its paper does not name it."""

    iterations: int = 27
    step: float = 0.08  # by which a step changes the value it changes most, in units of the normalised input
    weight: float = 7.0  # of the term that holds back what is attended already
    threshold: float = 0.5  # share of a map's maximum above which a place counts as attended already


@dataclass(frozen=True)
class Localization:
    """Localization maps of a trained classifier, refinement or one-step network."""

    model: str  # classifiers/NAME, refinements/NAME or one_step/NAME
    side: Literal["short", "long", "square", "none"] = "none"
    length: int | None = None  # pixels
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    fusion: Literal["mean", "max"] = "mean"
    normalise: Literal["max", "none"] = "max"  # divide by the maximum; or cut at 1, for networks that regress values
    stride: int = 4  # image pixels a stored cell
    climbing: Climbing | None = None  # of a classifier


@dataclass(frozen=True)
class Affinity:
    """The affinity branch of the inter-pixel relation network (IRN): edges, learned from confident labels."""

    labels: str  # pseudo_labels/NAME, of which only 255 is not learned from; rule: confident makes such labels
    backbone: Backbone
    training: Training
    frozen_backbone: bool = True  # only the branch learns (IRN's code); one without trained weights has to learn, too
    channels: int = 32  # of each level's edge features
    radius: int = 10  # cells: pairs that are nearer are compared
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True)
class Walk:
    """Maps spread by a random walk along the affinities (PSA, IRN)."""

    affinity: str  # affinities/NAME
    maps: str  # classifiers/NAME (cumulative attention), localizations/NAME or walks/NAME
    radius: int = 5  # cells: a step leads to those that are nearer; at 5 each cell begins 34 pairs
    beta: float = 10.0  # power of the affinities
    times: int = 8  # the walk has 2^times steps
    power: float = 1.0  # of the maps before the walk (AMR: 1.5)
    edge_weighting: bool = True  # maps times (1 - edge) before the walk


@dataclass(frozen=True)
class Crf:
    """Dense CRF; sigmas in pixels and grey levels."""

    iterations: int = 10
    gaussian_xy: float = 3.0
    gaussian_weight: float = 3.0
    bilateral_xy: float = 67.0
    bilateral_rgb: float = 3.0
    bilateral_weight: float = 4.0


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
    """A network that learns masks from tags in one training: the attention guided enhancement network (AGEN).

    Branch A classifies; branch B segments and learns from labels that the class-aware maps of A and of the attention
    guided modules (AGM) give while all of them train. Stages are counted as in the paper, 3 to 5.
    """

    classification: Backbone  # of branch A
    segmentation: Backbone  # of branch B
    training: Training
    shared: tuple[str, str]  # tap of A whose features both branches go on from, and the tap of B that they stand for
    classification_taps: tuple[str, str, str] | None = None  # of stages 3 to 5; null: the three after ``shared``
    segmentation_taps: tuple[str, str, str] | None = None
    head: Head = Head(2, 1024)  # of branch A
    channels: int = 512  # of branch B's last 3x3 convolution
    rate: int = 12  # its dilation
    agm: tuple[int, ...] = (3, 4, 5)  # stages with an attention guided module (Table 2)
    agm_channels: tuple[int, int] = (256, 512)  # of the AGMs' classification and segmentation branches (C and D)
    coam: tuple[int, ...] = (3, 4, 5)  # stages whose AGM has a context attention module (Table 3)
    # Which pixels a class or the background labels: 'value': score > delta; 'share': score >= (1 - delta) of the
    # class's maximum; 'rank': the pixels of the highest scores, delta of all. The paper can be read in all three ways.
    confident: Literal["value", "share", "rank"] = "value"
    delta: tuple[float, float, float, float] = (0.4, 0.4, 0.3, 0.3)  # of AGM-3, AGM-4, AGM-5 and branch A
    background_power: float = 8.0  # background score: (1 - strongest class)^power (Eq. 4)
    loss_size: Literal["input", "output"] = "input"  # logits upsampled to the image; or labels at the logits' size
    classification_weight: float = 1.0  # of L_cls, the mean over classes; the sum of Eq. 10 is that times their number
    boundary_weight: float = 1.0  # of L_boundary; 0: no CRF
    grid: int = 41  # cells on the long side of what the boundary loss compares (SEC)
    crf: Crf = Crf(10, 0.25, 3.0, 80 / 12, 13.0, 10.0)  # of the boundary loss, xy in its cells; SEC's
    delay: int = 0  # epochs that train the classification branches alone
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True)
class Test:
    """How every segmentation network is tested: one protocol for all rows."""

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    crf: Crf | None = None


@dataclass(frozen=True)
class Params:
    """The whole of params.yaml, defaults merged into the blocks."""

    experiment: str  # results/EXPERIMENT holds the outputs
    seed: int
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
    gallery: int = 12  # images in the report
    # In a profile or by --config: these rows alone, and what they are made of; null: all. dvc.yaml states all blocks.
    rows: tuple[str, ...] | None = None
