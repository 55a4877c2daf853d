"""torchvision, also where its compiled operators do not fit the installed torch."""

import importlib
import sys
from types import ModuleType

import torch

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []  # a library undeclares its operators once it is collected


def import_torchvision() -> ModuleType:
    """torchvision, imported.

    Beside a CPU-only torch, the torchvision of PyPI (built for CUDA) cannot load its operators and its import ends with
    'operator torchvision::nms does not exist'. Models, transforms and datasets need none of them, so there the
    operators are declared without an implementation. ``torchvision.ops.nms`` and ``torchvision.io`` stay unusable.
    """
    if "torchvision" not in sys.modules:
        _forget()  # what an import that failed elsewhere has left behind
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    _forget()
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        library.define(operator + _NMS)  # type: ignore[no-untyped-call]
    _declared.append(library)
    return importlib.import_module("torchvision")


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
