"""The methods by name."""

from pipeline.methods.amr import Amr
from pipeline.methods.base import Method, Output
from pipeline.methods.cam import Cam
from pipeline.methods.drs import plug
from pipeline.methods.edam import Edam
from pipeline.schema import Classifier

METHODS: dict[str, type[Method]] = {"cam": Cam, "amr": Amr, "edam": Edam}


def build_method(settings: Classifier, num_classes: int) -> Method:
    """The method that ``settings.method`` names, with DRS plugged in where ``settings.suppression`` says so.

    Raises:
        PipelineError: the backbone cannot have its settings or weights, or the suppression names no layer of it.
    """
    method = METHODS[settings.method](settings, num_classes)
    if settings.suppression is not None:
        plug(method, settings.suppression)
    return method


__all__ = ["METHODS", "Method", "Output", "build_method"]
