"""Masks of photos from a network that was trained on image-level tags.

>>> import wsss
>>> model = wsss.load("results/demo/predictions/oaa/model.safetensors")
>>> result = model.predict("photo.jpg")
>>> result.mask, result.classes  # H x W class ids, and the name of each id
"""

from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from wsss.model import Model, Result, load
    from wsss.onnx import export_onnx

__all__ = ["Model", "PipelineError", "Result", "export_onnx", "load"]


def __getattr__(name: str) -> Any:
    """Import torch only when it is needed, so that ``wsss --help`` is quick."""
    if name in ("Model", "Result", "load"):
        from wsss import model

        return getattr(model, name)
    if name == "export_onnx":
        from wsss.onnx import export_onnx

        return export_onnx
    raise AttributeError(f"module 'wsss' has no attribute {name!r}")
