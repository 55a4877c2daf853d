"""mIoU on PASCAL VOC 2012 as printed in the papers; none of these values was measured with this pipeline."""

from dataclasses import dataclass

VGG16, RESNET101 = "DeepLab-LargeFOV, VGG-16", "DeepLab-LargeFOV, ResNet-101"
ASPP_VGG16, ASPP_RESNET101 = "DeepLab-v2 (ASPP), VGG-16", "DeepLab-v2 (ASPP), ResNet-101"
TAGS, SALIENCY = "tags", "tags + saliency"
OAA = "Jiang et al., Online Attention Accumulation"
DRS = "Kim et al., Discriminative Region Suppression"
AMR = "Qin et al., Activation Modulation and Recalibration"
EDAM = "Wu et al., Embedded Discriminative Attention Mechanism"
AGEN = "Zhang et al., Attention Guided Enhancement Network"


@dataclass(frozen=True)
class Published:
    """mIoU in percent from one row of a paper's table; None if the paper does not state it."""

    method: str
    paper: str
    network: str  # the segmentation network
    supervision: str
    val: float
    test: float | None
    table: int  # number of the table in the paper


PUBLISHED = (
    Published("OAA", OAA, VGG16, SALIENCY, 61.6, 62.0, 1),
    Published("OAA+", OAA, VGG16, SALIENCY, 63.1, 62.8, 1),
    Published("OAA++", OAA, VGG16, SALIENCY, 63.0, 62.7, 1),
    Published("OAA+++", OAA, VGG16, SALIENCY, 63.7, 63.2, 1),
    Published("OAA", OAA, RESNET101, SALIENCY, 63.9, 65.6, 1),
    Published("OAA+", OAA, RESNET101, SALIENCY, 65.2, 66.4, 1),
    Published("OAA++", OAA, RESNET101, SALIENCY, 64.9, 66.3, 1),
    Published("OAA+++", OAA, RESNET101, SALIENCY, 66.1, 67.2, 1),
    Published("DRS, learnable", DRS, VGG16, SALIENCY, 62.9, None, 3),
    Published("DRS, delta 0.55", DRS, VGG16, SALIENCY, 62.8, None, 3),
    Published("DRS†, learnable", DRS, VGG16, SALIENCY, 63.5, 64.5, 4),
    Published("DRS†, delta 0.55", DRS, VGG16, SALIENCY, 63.6, 64.4, 4),
    Published("DRS†, learnable", DRS, RESNET101, SALIENCY, 66.5, 67.5, 4),
    Published("DRS†, delta 0.55", DRS, RESNET101, SALIENCY, 66.8, 67.4, 4),
    Published("DRS†, learnable", DRS, ASPP_RESNET101, SALIENCY, 70.4, 70.7, 4),
    Published("DRS†, delta 0.55", DRS, ASPP_RESNET101, SALIENCY, 71.2, 71.4, 4),
    Published("AMR", AMR, ASPP_RESNET101, TAGS, 68.8, 69.1, 1),
    Published("EDAM", EDAM, RESNET101, SALIENCY, 70.9, 70.6, 2),
    Published("AGEN, one step", AGEN, "AGEN, VGG-16 and ResNet-38", TAGS, 63.1, None, 4),
    Published("AGEN, two steps", AGEN, ASPP_VGG16, TAGS, 63.8, 64.2, 5),
    Published("AGEN, two steps", AGEN, ASPP_RESNET101, TAGS, 66.2, 66.9, 5),
)
