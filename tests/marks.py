"""Marks of tests that need a GPU."""

import pytest
import torch

needs_cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
