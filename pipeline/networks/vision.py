"""Imports torchvision even if its compiled operators do not match the installed torch."""

import importlib
import sys
from types import ModuleType

import torch

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []  # keeps them alive: a collected library removes its operators


def import_torchvision() -> ModuleType:
    """Import torchvision and return the module.

    With a CPU-only torch, PyPI's torchvision (built for CUDA) cannot load its operators, and its import fails with
    'operator torchvision::nms does not exist'. Models, transforms and datasets do not use these operators. They are
    then declared without an implementation; ``torchvision.ops.nms`` and ``torchvision.io`` remain unusable.
    """
    if "torchvision" not in sys.modules:
        _forget()  # remove the remains of an import that failed elsewhere
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
