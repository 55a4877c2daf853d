"""Loads the initial weights of a backbone, from torchvision or from a file."""

from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.networks.base import Backbone, PublishedWeights
from pipeline.networks.finite import listed, not_finite
from pipeline.networks.vision import import_torchvision
from pipeline.stores.files import sha256

# Prefixes of parameters of a published network that no backbone has.
IGNORED = ("classifier.", "fc.")
BACKBONE = "backbone."  # prefix of the backbone's parameters in segmentation networks, torchvision's and ours
CAFFE = ".conv3x3."  # part of the parameter names in ResNets that deeplab-pytorch converted from Caffe


def load_weights(backbone: Backbone, weights: str) -> None:
    """Load ``weights`` into the backbone: 'imagenet', or the path of a file with a state dict.

    The state dict may be that of the backbone itself, of torchvision's classifier, of a torchvision segmentation
    network with this backbone (such as deeplabv3_resnet101, trained on COCO), or of any network of this project (the
    model.pt of another run). Parameters outside the backbone are ignored. float16 tensors are cast to float32.

    Raises:
        PipelineError: the file is missing or damaged, the download failed, the weights are not finite, or they do not
            fit the backbone.
    """
    published = backbone.published
    if weights == "imagenet":
        source, state = _download(published)
    else:
        source, state = weights, _read(Path(weights))
    if any(CAFFE in name for name in state):
        raise PipelineError(
            f"{source}: was converted from Caffe (BGR input, strides in the 1x1 convolutions) and does not fit the"
            " backbone; use a file in torchvision's layout, or 'imagenet'"
        )
    state = {name.removeprefix(BACKBONE): value for name, value in state.items() if name.startswith(BACKBONE)} or state
    if not any(name.startswith("stages.") for name in state):
        state = _rename(backbone, state, published.prefix if published else "")
    if bad := not_finite(state):
        raise PipelineError(f"{source}: {listed(bad)}; use another file")
    own = backbone.state_dict()
    faults = [
        f"{name} is {_shape(value)}, not {_shape(own[name])}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    if not faults:
        # Not strict: files saved before batch norms had num_batches_tracked load as well.
        keys = backbone.load_state_dict(state, strict=False)
        faults += [f"{name} is missing" for name in keys.missing_keys]
        faults += [f"{name} is unexpected" for name in keys.unexpected_keys]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise PipelineError(f"{source}: does not fit the backbone: {'; '.join(faults[:3])}{more}")


def _rename(backbone: Backbone, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename torchvision's parameters to the backbone's, which add the prefix 'stages.TAP.'."""
    names = {prefix + own.split(".", 2)[2]: own for own in backbone.state_dict()}
    return {names.get(name, name): value for name, value in state.items() if not name.startswith(IGNORED)}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise PipelineError(f"{path}: is missing; set backbone.weights to a file, 'imagenet' or null") from None
    except Exception as error:  # damaged files raise many types, from UnpicklingError to AssertionError
        raise PipelineError(
            f"{path}: is damaged or contains more than tensors; use torch.save(model.state_dict(), ...)"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state"), dict):
        state = state["state"]  # a model.pt of this project, which also stores the network's settings
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise PipelineError(f"{path}: contains no state dict; save one with torch.save(model.state_dict(), ...)")
    return state


def _download(published: PublishedWeights | None) -> tuple[str, dict[str, Tensor]]:
    if published is None:
        raise PipelineError("weights 'imagenet': torchvision publishes none for this backbone; set a file, or null")
    url = getattr(import_torchvision().models, published.enum).IMAGENET1K_V1.url
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    try:
        state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # no network, a wrong hash, or a damaged file in the cache
        raise PipelineError(
            f"{cached}: is missing or damaged, and the download failed; save {url} there, or set weights to a copy"
        ) from error
    digits = cached.stem.rpartition("-")[2]  # torch compares the hash of a download, but not of a cached file
    if cached.exists() and not sha256(cached).startswith(digits):
        raise PipelineError(f"{cached}: damaged: its sha256 does not start with {digits}; delete it")
    return url, state


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
