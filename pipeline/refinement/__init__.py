"""The refinement networks by kind."""

from pipeline.refinement.integral import IntegralModel

REFINEMENTS = {"integral": IntegralModel}

__all__ = ["REFINEMENTS", "IntegralModel"]
