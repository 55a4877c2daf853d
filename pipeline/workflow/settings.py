"""Parameters with valid settings, and a cache of them, so that planning does not import torch.

The settings of a method or a network are a class in the file of its implementation, which imports torch. That takes
longer than the rest of a plan. The cache maps a block and the code of its implementations to the block as JSON types. A
block is in it only if its settings are valid.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.config import params as parameters
from pipeline.config.registry import BACKBONES, Choice, plain
from pipeline.config.schema import Backbone, Params, backbones
from pipeline.stores import cache
from pipeline.workflow import closure

BUILDER = closure.ROOT / "pipeline" / "networks" / "backbones.py"
CACHE = Path("results") / ".hashes-settings"  # of all experiments
LIMIT = 5000  # entries; the oldest are dropped


def load(
    files: Sequence[Path],
    overrides: Mapping[str, Any] | None = None,
    notice: parameters.Notice = lambda line: None,
) -> Params:
    """Read, merge and validate params files, with settings and backbones; see ``pipeline.config.params.validate``."""
    before = len(_known())
    checks = parameters.Checks(_faults, _backbone_faults)
    params = parameters.load(files, overrides, resolve=True, notice=notice, checks=checks)
    if len(_known()) > before:
        _save()
    return params


def as_json(value: Any) -> Any:
    """Convert parameters to JSON types.

    Raises:
        PipelineError: the settings of a block have faults; it has one line for each.
    """
    if not isinstance(value, Mapping):
        return plain(value) if (key := _key(value)) is None else _known().get(key) or _add(key, value)
    return {name: as_json(item) for name, item in value.items()}


def implementation_files(value: Any) -> Iterator[Path]:
    """Yield the files of the implementations that a block names: its method, backbones, rule or network."""
    for registry, name in _names(value):
        if (file := registry.file(name)) is not None:
            yield file


def _faults(block: Any, sound: bool) -> Iterator[str]:
    """Yield the faults in the settings of a block's choices; see ``pipeline.config.params.choice_faults``."""
    key = _key(block)
    if key is None or key not in _known():
        lines = list(parameters.choice_faults(block, sound))
        yield from lines
        if sound and not lines and key is not None:
            _known()[key] = plain(block)


def _backbone_faults(block: Any) -> Iterator[str]:
    """Yield the faults of a block's backbones; see ``pipeline.config.params.backbone_faults``."""
    keys = {_backbone_key(backbone) for backbone in backbones(block).values()}
    if not keys <= _known().keys():
        lines = list(parameters.backbone_faults(block))
        yield from lines
        if not lines:
            _known().update((key, None) for key in keys if key is not None)


def _backbone_key(backbone: Backbone) -> str | None:
    """Return a hash of the backbone without its weights, of the code that builds it, and of its libraries' versions."""
    if (file := BACKBONES.file(backbone.name)) is None:
        return None
    return _hash(backbone, closure.digest((BUILDER, file)), *map(_version, ("torch", "torchvision", "timm")))


@functools.cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _add(key: str, block: Any) -> Any:
    parameters.check(block, "params")
    _known()[key] = plain(block)
    _save()
    return _known()[key]


def _key(block: Any) -> str | None:
    """Return a hash of the block and of the code of its implementations; None if it has no settings to be cached."""
    names = list(_names(block))
    files = [registry.file(name) for registry, name in names]
    if not any(registry is not BACKBONES for registry, _ in names) or None in files:
        return None  # the block has no choice, or one that is not in the registry's package, such as that of a test
    code = closure.digest((Path(parameters.__file__), *sorted(file for file in set(files) if file)))
    return _hash(block, code)


def _hash(block: Any, *versions: str) -> str:
    values = _raw(dataclasses.replace(block, weights=None) if isinstance(block, Backbone) else block)
    text = json.dumps([type(block).__name__, values, *versions], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def _raw(value: Any) -> Any:
    """Convert a block to JSON types without the defaults of its choices' settings, which need no import."""
    if isinstance(value, Choice):
        return {value.name: value.raw}
    if dataclasses.is_dataclass(value):
        return _raw(vars(value))
    if isinstance(value, Mapping):
        return {str(key): _raw(item) for key, item in value.items()}
    return [_raw(item) for item in value] if isinstance(value, list | tuple) else value


def _names(value: Any) -> Iterator[tuple[Any, str]]:
    """Yield the registry and the name of each implementation that a block names."""
    if isinstance(value, Choice):
        yield value.registry, value.name
    elif isinstance(value, Backbone):
        yield BACKBONES, value.name
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _names(item)
    elif dataclasses.is_dataclass(value):
        yield from _names(vars(value))


@functools.cache
def _known() -> dict[str, Any]:
    """The cache's entries, and those that this process adds."""
    entries = cache.load(CACHE)
    return entries if isinstance(entries, dict) else {}


def _save() -> None:
    cache.save(CACHE, dict(list(_known().items())[-LIMIT:]))
