"""The refinement networks by kind."""

from pipeline.refinement.base import RefinementNetwork
from pipeline.refinement.integral import IntegralModel
from pipeline.refinement.regression import RegressionNetwork

REFINEMENTS: dict[str, type[RefinementNetwork]] = {"integral": IntegralModel, "regression": RegressionNetwork}

__all__ = ["REFINEMENTS", "IntegralModel", "RefinementNetwork", "RegressionNetwork"]
