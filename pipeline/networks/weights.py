"""Loads the initial weights of a backbone, from a library that publishes them or from a file."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.networks.base import Backbone
from pipeline.networks.finite import listed, not_finite
from pipeline.networks.state_dicts import read_state

# Prefixes of the parameters of classification heads, which no backbone has: torchvision's and timm's.
IGNORED = ("classifier.", "fc.", "head.", "pre_logits.", "aux_classifier.")
CAFFE = ".conv3x3."  # part of the parameter names in ResNets that deeplab-pytorch converted from Caffe
SHOWN = 3  # names of parameters in a message


def load_weights(backbone: Backbone, weights: str) -> None:
    """Load ``weights`` into the backbone: 'imagenet', or the path of a file with a state dict.

    The state dict may be that of the backbone itself, of torchvision's or timm's classifier, of a torchvision
    segmentation network with this backbone (such as deeplabv3_resnet101, trained on COCO), or of any network of this
    project (the model.pt of another run). Its names may have a common prefix, such as 'module.' or 'encoder.';
    parameters outside the backbone are ignored. float16 tensors are cast to float32.

    Raises:
        PipelineError: the file is missing or damaged, the download failed, the weights are not finite, or they do not
            fit the backbone.
    """
    published = backbone.published
    if weights == "imagenet":
        if published is None:
            raise PipelineError("weights 'imagenet': no library publishes any for this backbone; set a file, or null")
        source, state = published.download()
    else:
        source, state = weights, read_state(Path(weights))
    if any(CAFFE in name for name in state):
        raise PipelineError(
            f"{source}: was converted from Caffe (BGR input, strides in the 1x1 convolutions) and does not fit the"
            " backbone; use a file in torchvision's layout, or 'imagenet'"
        )
    if bad := not_finite(state):
        raise PipelineError(f"{source}: {listed(bad)}; use another file")
    own = backbone.state_dict()
    layout = _published_names(backbone)
    state = _without_prefix(source, state, own.keys() | layout.keys())
    constants: Collection[str] = ()
    if not own.keys() & state.keys():
        unused, constants = published.unused() if published else (), backbone.constants
        named = {name: value for name, value in state.items() if name in layout or name not in unused}
        state = {layout.get(name, name): value for name, value in named.items() if not name.startswith(IGNORED)}
    faults = [
        f"{name} is {_shape(value)}, not {_shape(own[name])}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    if not faults:
        # Not strict: files saved before batch norms had num_batches_tracked load as well.
        keys = backbone.load_state_dict(state, strict=False)
        faults += [f"{name} is missing" for name in keys.missing_keys if name not in constants]
        faults += [f"{name} is unexpected" for name in keys.unexpected_keys]
    if faults:
        more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise PipelineError(f"{source}: does not fit the backbone: {'; '.join(faults[:SHOWN])}{more}")


def _published_names(backbone: Backbone) -> dict[str, str]:
    """Map the published names of the parameters to the backbone's, which add 'stages.TAP.'."""
    own = {name.split(".", 2)[2]: name for name in backbone.state_dict() if name not in backbone.constants}
    published = backbone.published.names(own) if backbone.published else {name: name for name in own}
    return {theirs: own[name] for theirs, name in published.items()}


def _without_prefix(source: str, state: dict[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Strip the prefix under which the file holds the backbone, and drop the parameters outside of it.

    The prefix is the one under which most of the ``expected`` names occur; it may be empty.

    Raises:
        PipelineError: the file holds the backbone under several prefixes, such as MoCo's encoder_q and encoder_k.
    """
    by_end: dict[str, list[str]] = {}
    for name in expected:
        by_end.setdefault(name.rpartition(".")[2], []).append(name)
    counts: Counter[str] = Counter()
    for key in state:
        for name in by_end.get(key.rpartition(".")[2], ()):
            if key.endswith(name) and (len(key) == len(name) or key[-len(name) - 1] == "."):
                counts[key[: -len(name)]] += 1
    if not counts:
        return state
    most = max(counts.values())
    prefixes = [prefix for prefix, count in counts.items() if count == most]
    if len(prefixes) > 1 and most > 1:
        raise PipelineError(
            f"{source}: holds the backbone {len(prefixes)} times, under {', '.join(map(repr, prefixes[:SHOWN]))}; "
            "save the one to use with torch.save(state_dict, ...)"
        )
    prefix = prefixes[0] if most > counts[""] else ""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
