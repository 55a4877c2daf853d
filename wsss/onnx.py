"""Export of a model to ONNX, for runtimes without PyTorch."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import PipelineError
from pipeline.stores.files import atomic
from wsss.model import Model

INPUT, OUTPUT = "image", "probabilities"


def export_onnx(model: Model, path: str | Path) -> None:
    """Write the network as an ONNX file: one photo of any size in, the probability of each class at each pixel out.

    ``image`` is H x W x 3 uint8, RGB and upright. ``probabilities`` is (K + 1) x H x W float32; the mask is its argmax.
    The network runs in float32 at the photo's size, and on the mirrored photo if the test protocol says so. The file
    contains neither the protocol's other scales nor the reduction of large photos nor the CRF. The names of the classes
    are in its metadata, as a JSON list under ``classes``.

    Raises:
        PipelineError: onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch.onnx imports it)
    except ImportError as error:
        raise PipelineError(f"{error.name}: is not installed; pip install 'wsss[onnx]'") from None
    graph = _Graph(model).eval()
    height, width = torch.export.Dim("height", min=32), torch.export.Dim("width", min=32)
    example = torch.zeros(96, 128, 3, dtype=torch.uint8)
    program = torch.onnx.export(
        graph,
        (example,),
        dynamo=True,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: height, 1: width},),
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    for key, value in (("classes", json.dumps(model.classes)), ("wsss", json.dumps(model.metadata))):
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    with atomic(Path(path)) as temporary:
        onnx.save(proto, temporary)


class _Graph(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network = copy.deepcopy(model.network).cpu().float()
        self.flip = model.test.flip
        self.mean: Tensor
        self.std: Tensor
        stored: dict[str, Any] = dict(model.metadata["normalisation"])
        self.register_buffer("mean", torch.tensor(stored["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(stored["std"])[:, None, None])

    def forward(self, image: Tensor) -> Tensor:
        inputs = ((image.permute(2, 0, 1).float() / 255 - self.mean) / self.std)[None]
        scores = self._probabilities(inputs)
        if self.flip:
            scores = (scores + self._probabilities(inputs.flip(3)).flip(3)) / 2
        return scores[0]

    def _probabilities(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.network(inputs)
        size = inputs.shape[2], inputs.shape[3]
        return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False).softmax(1)
