"""The methods by name."""

from pipeline.methods.base import Method, Output
from pipeline.methods.cam import Cam
from pipeline.schema import Classifier

METHODS: dict[str, type[Method]] = {"cam": Cam}


def build_method(settings: Classifier, num_classes: int) -> Method:
    """The method that ``settings.method`` names."""
    return METHODS[settings.method](settings, num_classes)


__all__ = ["METHODS", "Method", "Output", "build_method"]
