"""Initial weights of a backbone: torchvision's, or a file's."""

from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.networks.base import Backbone, Published
from pipeline.networks.vision import import_torchvision

# Parts of a published network that no backbone has.
IGNORED = ("classifier.", "fc.")
INSIDE = "backbone."  # what the names of a backbone begin with in a segmentation network, torchvision's and ours
CAFFE = ".conv3x3."  # in every block of the ResNets that deeplab-pytorch converted from Caffe


def load_weights(backbone: Backbone, weights: str) -> None:
    """Fill the backbone from ``weights``: 'imagenet' or a file with a state dict.

    The state dict is this backbone's own, torchvision's of the whole network, torchvision's of a segmentation network
    around it (as deeplabv3_resnet101's, trained on COCO), or that of any network of ours, as the model.pt of another
    run holds it; what belongs to no backbone is left out. float16 tensors are cast to the parameters' float32.

    Raises:
        PipelineError: the file is missing or damaged, the download failed, or the weights do not fit.
    """
    published = backbone.published
    if weights == "imagenet":
        source, state = _download(published)
    else:
        source, state = weights, _read(Path(weights))
    if any(CAFFE in name for name in state):
        raise PipelineError(
            f"{source}: was converted from Caffe (BGR input, strides in the 1x1 convolutions) and does not fit the"
            " backbone; name a file in torchvision's layout, or 'imagenet'"
        )
    state = {name.removeprefix(INSIDE): value for name, value in state.items() if name.startswith(INSIDE)} or state
    if not any(name.startswith("stages.") for name in state):
        state = _rename(backbone, state, published.prefix if published else "")
    own = backbone.state_dict()
    faults = [
        f"{name} is {_shape(value)}, not {_shape(own[name])}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    if not faults:
        # Not strict, so that files from before batch norms counted their batches still load.
        keys = backbone.load_state_dict(state, strict=False)
        faults += [f"{name} is missing" for name in keys.missing_keys]
        faults += [f"{name} is unexpected" for name in keys.unexpected_keys]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise PipelineError(f"{source}: does not fit the backbone: {'; '.join(faults[:3])}{more}")


def _rename(backbone: Backbone, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """From torchvision's names to the backbone's, which are the same behind 'stages.TAP.'."""
    names = {prefix + own.split(".", 2)[2]: own for own in backbone.state_dict()}
    return {names.get(name, name): value for name, value in state.items() if not name.startswith(IGNORED)}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise PipelineError(f"{path}: missing; backbone.weights names a file, 'imagenet' or null") from None
    except Exception as error:  # damaged bytes raise anything, from UnpicklingError to AssertionError
        raise PipelineError(
            f"{path}: damaged, or holds more than tensors; save one with torch.save(model.state_dict(), ...)"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state"), dict):
        state = state["state"]  # a model.pt of ours, which also tells how the network is built
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise PipelineError(f"{path}: holds no state dict; save one with torch.save(model.state_dict(), ...)")
    return state


def _download(published: Published | None) -> tuple[str, dict[str, Tensor]]:
    if published is None:
        raise PipelineError("weights 'imagenet': none are published for this backbone; name a file, or null")
    url = getattr(import_torchvision().models, published.enum).IMAGENET1K_V1.url
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    try:
        state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # no network, a wrong hash, or a damaged file in the cache
        raise PipelineError(
            f"{cached}: missing or damaged, and the download failed; fetch {url} there, or name its copy as weights"
        ) from error
    return url, state


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
