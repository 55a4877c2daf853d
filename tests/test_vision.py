"""Importing torchvision, also where its compiled operators cannot be loaded."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.networks.vision import import_torchvision

# What torchvision does on a CPU-only torch: registers a fake kernel for operators that nothing has defined.
BROKEN = """
import torch
import torchvision.extension
torchvision.extension.loaded  # not there if a half-imported extension is left over
torch.library.register_fake("torchvision::nms")(lambda boxes, scores, threshold: boxes)
torch.library.register_fake("torchvision::qnms")(lambda boxes, scores, threshold: boxes)
"""


def test_models_and_transforms_work() -> None:
    torchvision = import_torchvision()
    image = torch.arange(12.0).reshape(3, 2, 2)
    transforms = importlib.import_module("torchvision.transforms.v2")
    assert torch.equal(transforms.functional.horizontal_flip(image), image.flip(-1))
    assert torchvision.models.VGG16_Weights.IMAGENET1K_V1.url.startswith("https://")


def test_importing_again_gives_the_same_module() -> None:
    assert import_torchvision() is import_torchvision() is sys.modules["torchvision"]


def test_another_error_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError(f"{name} is built for another torch")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(RuntimeError, match="another torch"):
        import_torchvision()


@pytest.mark.parametrize("tried", [True, False], ids=["after a failed import", "at first"])
def test_missing_operators_are_declared(tried: bool, tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(BROKEN)
    (package / "extension.py").write_text("loaded = False\n")
    program = """
import gc, sys, torch
if TRIED:
    try:
        import torchvision
    except RuntimeError as error:
        print(error)
from pipeline.networks.vision import import_torchvision
module = import_torchvision()
gc.collect()
print(module is import_torchvision() is sys.modules["torchvision"], torch.ops.torchvision.nms.default._schema)
""".replace("TRIED", str(tried))
    path = os.pathsep.join([str(tmp_path), str(Path.cwd())])
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    expected = ["True torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"]
    if tried:
        expected.insert(0, "operator torchvision::nms does not exist")
    assert done.stdout.splitlines() == expected, done.stderr
