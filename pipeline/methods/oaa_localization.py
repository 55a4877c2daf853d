"""OAA's network for object localization (OAA Sec. 4.5, Fig. 12): one branch accumulates, the other learns from it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor, nn

from pipeline.config.reader import Positive, Range
from pipeline.config.registry import METHODS
from pipeline.config.schema import Classifier
from pipeline.methods.base import Method, Output, occlude
from pipeline.networks.backbones import build_backbone
from pipeline.networks.heads import ClassAwareHead
from pipeline.refinement.integral import integral_loss
from pipeline.training import distributed


@dataclass(frozen=True, eq=False)
class TwoBranchOutput(Output):
    """Logits and maps of branch F1; ``integral``: the maps of branch F2, B x K x h x w raw scores."""

    integral: Tensor


@METHODS.register("oaa_localization")
class OaaLocalization(Method):
    """Two class-aware heads on one backbone. Unlike OAA+, it localizes objects in images that it was not trained on.

    Branch F1 (``head``) is the classifier whose attention accumulates, as in ``Cam``. Branch F2 (``integral``) has the
    same layers, and the cumulative attention supervises its maps by the hybrid loss (OAA Eq. 9) within the same
    training. F2 yields the localization maps, F1 the class scores. Gradients of both losses reach the backbone.

    An image supervises F2 as soon as all of its tags have a cumulative map. The paper says neither when F2 begins to
    learn nor how its loss is weighted. The attention drop layer with ``target: features`` occludes F1 alone.
    """

    map_name = "Integral attention"
    learns_attention = True

    @dataclass(frozen=True)
    class Settings:
        """Settings of the loss of F2; see ``pipeline.refinement.integral.integral_loss``."""

        weight: Positive = 1.0  # of the loss of F2, relative to the classification loss
        loss: Literal["hybrid", "cross_entropy", "enhance"] = "hybrid"  # OAA Eq. 9, 6, 7 (Table 4: HL, MCE, EP)
        # Sum of the means of all classes (paper) or of the image's tags, or pooled (public code of OAA+)
        reduction: Literal["class", "present", "pooled"] = "class"
        threshold: Annotated[float, Range(least=0, below=1)] = 0.0  # attention above which a pixel is in N+ (Table 5)

    settings: Settings

    def __init__(self, block: Classifier, num_classes: int) -> None:
        super().__init__(block, num_classes)
        self.backbone = build_backbone(block.backbone)
        self.head = ClassAwareHead(self.backbone.out_channels, block.head, num_classes)
        self.integral = ClassAwareHead(self.backbone.out_channels, block.head, num_classes)

    def describe(self) -> str:
        """Such as 'OAA with an integral branch (hybrid loss)'."""
        return f"OAA with an integral branch ({self.settings.loss.replace('_', ' ')} loss)"

    @property
    def is_mean(self) -> bool:
        return True

    def new_layers(self) -> Iterable[nn.Module]:
        return [self.head, self.integral, self.suppressors]

    def layers(self) -> dict[str, list[nn.Module]]:
        """The backbone's layers, and 'head' and 'integral' for the 3x3 convolutions of the branches, if any."""
        branches = {"head": self.head, "integral": self.integral}
        activations: dict[str, list[nn.Module]] = {
            name: [module for module in head.convs if isinstance(module, nn.ReLU)] for name, head in branches.items()
        }
        return self.backbone.layers() | {name: modules for name, modules in activations.items() if modules}

    def forward(self, images: Tensor, occluded: Tensor | None = None) -> TwoBranchOutput:
        features = self.backbone(images)
        maps = self.head.classify(occlude(self.head.penultimate(features), occluded))
        return TwoBranchOutput(maps.float().mean((2, 3)), maps, self.integral(features))

    def attention_loss(self, output: Output, attention: Tensor, known: Tensor, tags: Tensor) -> Tensor:
        assert isinstance(output, TwoBranchOutput)
        settings = self.settings
        chosen = known.nonzero()[:, 0].to(tags.device, non_blocking=True)
        if not distributed.agreed(bool(len(chosen))):
            return tags.new_zeros(())
        if not len(chosen):  # another process has some, and all must run backward through the same layers
            return 0 * output.integral.float().sum()
        logits = output.integral[chosen]
        loss = integral_loss(
            logits, attention[chosen], tags[chosen], settings.loss, settings.reduction, settings.threshold
        )
        return settings.weight * loss * (len(chosen) / len(known))

    def localization(self, output: Output) -> Tensor:
        """The positive part of the maps of F2, B x K x h x w."""
        assert isinstance(output, TwoBranchOutput)
        return output.integral.float().relu()
