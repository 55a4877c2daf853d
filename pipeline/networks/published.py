"""The ImageNet weights that a library publishes for a network, and the names of its parameters."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.networks.vision import import_torchvision
from pipeline.stores.files import sha256


class PublishedWeights(ABC):
    """The published weights of a network. A backbone's parameters have these names, after 'stages.TAP.'."""

    @abstractmethod
    def download(self) -> tuple[str, dict[str, Tensor]]:
        """Return the source and the state dict.

        Raises:
            PipelineError: there are none, or the download failed.
        """

    def names(self, own: Collection[str]) -> Mapping[str, str]:
        """Map the published names of the backbone's parameters ``own`` to the backbone's."""
        return {name: name for name in own}

    def unused(self) -> Collection[str]:
        """Published names of parameters that the backbone may lack, besides those of heads (``weights.IGNORED``)."""
        return ()


class TorchvisionWeights(PublishedWeights):
    """The first ImageNet weights that torchvision publishes for a network.

    Args:
        enum: torchvision's enum of the network's weights.
        prefix: of the backbone's parameters in torchvision's state dict.
    """

    def __init__(self, enum: str, prefix: str = "") -> None:
        self.enum, self.prefix = enum, prefix

    def names(self, own: Collection[str]) -> Mapping[str, str]:
        return {self.prefix + name: name for name in own}

    def download(self) -> tuple[str, dict[str, Tensor]]:
        url = getattr(import_torchvision().models, self.enum).IMAGENET1K_V1.url
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
