"""Model files: a trained segmentation network with all that segmenting a photo needs, in the safetensors format.

The tensors are the network's state. The metadata has one key, ``wsss``, whose value is a JSON object:

==================  ====================================================================================
``format``          1; a reader refuses other numbers
``classes``         names of the classes 1..K; 0 is the background
``block``           'Segmentation' or 'OneStep': the section of params.yaml
``settings``        the network's block of params.yaml, with its name, settings and backbone
``normalisation``   ``mean`` and ``std`` of the red, green and blue values in [0, 1]
``test``            the test protocol (scales, flip, crf)
``megapixels``      ``dataset.working_megapixels``, to which the network sees larger photos reduced
``provenance``      experiment, row, seed, sha256 of the training's code, and the versions of its packages
==================  ====================================================================================

A backbone of timm converts the normalised values to its own mean and deviation; the tensors contain both
(``stages.stage1.normalise``). There is a single key since safetensors writes several in random order.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from pipeline.config import params
from pipeline.config.registry import plain
from pipeline.config.schema import Test
from pipeline.data.loading import MEAN, STD, normalisation
from pipeline.errors import PipelineError
from pipeline.training import models
from pipeline.training.checkpoint import load_model

KEY = "wsss"
FORMAT = 1


@dataclass(frozen=True)
class ModelFile:
    """The content of a model file.

    Attributes:
        network: in evaluation mode.
        classes: names of the classes 1..K.
        tables: 3 x 256 normalised values of the grey levels (``pipeline.data.loading.normalise``).
        test: the test protocol.
        megapixels: the network sees larger photos reduced to this.
        precision: of the network's training, in which it is used.
        metadata: all metadata, as JSON types.
    """

    network: nn.Module
    classes: tuple[str, ...]
    tables: NDArray[np.float32]
    test: Test
    megapixels: float
    precision: str
    metadata: Mapping[str, Any]


def write(
    path: Path,
    model: Path,
    classes: Sequence[str],
    test: Test,
    megapixels: float,
    provenance: Mapping[str, Any],
) -> None:
    """Write a model file from ``model``, a file of ``pipeline.training.models.save``. Equal models give equal bytes.

    Args:
        classes: names of the classes 1..K.
        megapixels: ``dataset.working_megapixels``.
    """
    trained = load_model(model)
    metadata = {
        "format": FORMAT,
        "classes": list(classes),
        "block": trained["block"],
        "settings": trained["settings"],
        "normalisation": {"mean": MEAN.tolist(), "std": STD.tolist()},
        "test": plain(test),
        "megapixels": megapixels,
        "provenance": provenance,
    }
    state = {name: value.clone(memory_format=torch.contiguous_format) for name, value in trained["state"].items()}
    # Not save_file: on a full disk it raises an error of its own and leaves a temporary file.
    path.write_bytes(save(state, {KEY: json.dumps(metadata, sort_keys=True, ensure_ascii=False)}))


def read_metadata(path: Path) -> dict[str, Any]:
    """Read only the metadata of a model file.

    Raises:
        PipelineError: it is not a model file, or one of another format.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
    except FileNotFoundError:
        raise PipelineError(f"{path}: no such file; name a model.safetensors of a row's predictions") from None
    except (OSError, SafetensorError) as error:
        raise PipelineError(f"{path}: not a safetensors file, or damaged ({error}); copy it again") from None
    if text is None:
        raise PipelineError(f"{path}: not a model file of wsss; name a model.safetensors of a row's predictions")
    metadata: dict[str, Any] = json.loads(text)
    if metadata.get("format") != FORMAT:
        raise PipelineError(f"{path}: has format {metadata.get('format')}, but this version of wsss reads {FORMAT}")
    return metadata


def read(path: Path, device: torch.device) -> ModelFile:
    """Read a model file and build its network on ``device``.

    Raises:
        PipelineError: it is not a model file, it is damaged, or this version of wsss does not know its network.
    """
    metadata = read_metadata(path)
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    classes = tuple(metadata["classes"])
    fields = {"block": metadata["block"], "settings": metadata["settings"], "num_classes": len(classes), "state": state}
    mean, std = (np.array(metadata["normalisation"][key], np.float32) for key in ("mean", "std"))
    test = params.read_block(Test, metadata["test"], str(path))
    network = models.rebuild(fields, str(path), device)
    precision = metadata["settings"]["training"]["precision"]
    return ModelFile(network, classes, normalisation(mean, std), test, metadata["megapixels"], precision, metadata)
