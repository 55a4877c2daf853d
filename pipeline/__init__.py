"""Weakly supervised semantic segmentation: the library that the stages use to turn image tags into pixel masks."""
