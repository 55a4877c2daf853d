"""Inference of trained networks on whole images."""
