"""Registries of implementations: methods, refinement, segmentation and one-step networks, label rules, backbones.

An implementation registers itself in its own file: ``@METHODS.register("amr")``. A registry finds its names by parsing
the files of its package, and imports a file when its entry is first used. So no other file lists the names, a stage
imports only the implementations that its block names, and reading params.yaml does not import torch.
"""

import ast
import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.config import reader
from pipeline.errors import PipelineError

T = TypeVar("T")
EXECUTION = {"execution": True}  # metadata of a field that is an execution option: no result depends on it
_ROOT = Path(__file__).parents[2]


class Registry(Generic[T]):
    """The implementations of one kind, by name.

    A name that ends in a colon, such as 'timm:', is that of a family: its entry serves all names that begin with it.

    Args:
        variable: name of this registry in this module, which the decorators of its entries use.
        folder: folder that is searched for entries, relative to the project, such as 'pipeline/methods'.
        kind: term for an entry in messages, such as 'method'.
    """

    def __init__(self, variable: str, folder: str, kind: str) -> None:
        self.variable, self.folder, self.kind = variable, folder, kind
        self._loaded: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers a class or function under ``name``.

        Raises:
            TypeError: the class does not define all abstract methods of its base.
        """

        def enter(entry: T) -> T:
            if lacking := sorted(getattr(entry, "__abstractmethods__", ())):
                raise TypeError(f"{self.kind} {name}: {entry} must define {', '.join(lacking)}")
            self._loaded[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        """Return the entry; import its module if necessary.

        Raises:
            PipelineError: no file registers the name.
        """
        key = _entry_name(name)
        if key not in self._loaded:
            if (file := self.file(name)) is None:
                raise PipelineError(self.unknown(name))
            importlib.import_module(".".join(file.relative_to(_ROOT).with_suffix("").parts))
        return self._loaded[key]

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str) or name.endswith(":"):
            return False
        key = _entry_name(name)
        return key in self._loaded or key in self._files

    def names(self) -> list[str]:
        """All names but those of families; entries that are registered outside of the package, as in a test, count."""
        return [name for name in self._all() if not name.endswith(":")]

    def families(self) -> list[str]:
        """The names of the families, such as 'timm:'."""
        return [name for name in self._all() if name.endswith(":")]

    def _all(self) -> list[str]:
        return sorted({*self._files, *self._loaded})

    def file(self, name: str) -> Path | None:
        """The file that registers ``name`` or its family; None if no file of the package does."""
        return self._files.get(_entry_name(name))

    def unknown(self, name: str) -> str:
        """The message for a name that is not registered."""
        names = [*self.names(), *(f"{family}NAME" for family in self.families())]
        return f"{name!r} is none of {', '.join(names)}{reader.did_you_mean(name, names)}"

    @functools.cached_property
    def _files(self) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for file in sorted((_ROOT / self.folder).rglob("*.py")):
            text = file.read_text(encoding="utf-8")
            if f"@{self.variable}.register(" in text:
                files |= dict.fromkeys(self._names(ast.parse(text)), file)
        return files

    def _names(self, tree: ast.Module) -> list[str]:
        return [
            call.args[0].value
            for node in tree.body
            if isinstance(node, ast.ClassDef | ast.FunctionDef)
            for call in node.decorator_list
            if isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and isinstance(call.func.value, ast.Name)
            and (call.func.value.id, call.func.attr) == (self.variable, "register")
            and isinstance(call.args[0], ast.Constant)
            and isinstance(call.args[0].value, str)
        ]

    def read(self, value: Any, where: str, faults: reader.Faults) -> "Choice | None":
        """Build a choice from ``NAME`` or ``{NAME: {KEY: VALUE}}``. Its settings are validated on first access."""
        name: Any = value
        raw: Any = None
        if isinstance(value, Mapping) and len(value) == 1:
            name, raw = next(iter(value.items()))
        if not isinstance(name, str) or not isinstance(raw, Mapping | None):
            faults.append(f"{where}: must be NAME or {{NAME: {{...}}}}, not {reader.quoted(value)}")
        elif name not in self:
            faults.append(f"{where}: {self.unknown(name)}")
        else:
            return Choice(self, name, raw or {}, where)
        return None


def _entry_name(name: str) -> str:
    """The name under which the entry for ``name`` is registered: its family's name if it has a colon."""
    family, colon, member = name.partition(":")
    return family + colon if member else name


class Choice:
    """A registered implementation and its settings, as a block of params.yaml specifies them.

    ``settings`` is an instance of the entry's ``Settings``, or of the entry itself if it is a dataclass. It is built on
    first access, which imports the entry's module.
    """

    def __init__(
        self, registry: Registry[Any], name: str, raw: Mapping[str, Any] | None = None, where: str = ""
    ) -> None:
        self.registry, self.name, self.raw, self.where = registry, name, dict(raw or {}), where

    @property
    def entry(self) -> Any:
        """The registered class or function."""
        return self.registry[self.name]

    @functools.cached_property
    def settings(self) -> Any:
        """The validated settings.

        Raises:
            PipelineError: the settings have faults; it has one line for each.
        """
        faults: reader.Faults = []
        kind = getattr(self.entry, "Settings", self.entry)
        built = reader.build_block(kind, self.raw, f"{self.where}.{self.name}", faults)
        if faults:
            raise PipelineError(*faults)
        return built

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Choice):
            return NotImplemented
        same = self.registry is other.registry and self.name == other.name
        return same and (self.raw == other.raw or self.settings == other.settings)

    def __hash__(self) -> int:
        return hash((self.registry.variable, self.name))

    def __repr__(self) -> str:
        return f"{self.name}({self.raw})"


@dataclasses.dataclass(frozen=True)
class Name:
    """Metadata of an annotated field that holds only the name of a registered entry, without settings."""

    registry: Registry[Any]

    def read(self, value: Any, where: str, faults: reader.Faults) -> Any:
        """Return the name. Append a line to ``faults`` if it is not registered."""
        if not isinstance(value, str):
            faults.append(f"{where}: must be text, not {reader.quoted(value)}")
        elif value not in self.registry:
            faults.append(f"{where}: {self.registry.unknown(value)}")
        return value


METHODS: Registry[Any] = Registry("METHODS", "pipeline/methods", "method")
ONE_STEP: Registry[Any] = Registry("ONE_STEP", "pipeline/methods", "one-step network")
REFINEMENTS: Registry[Any] = Registry("REFINEMENTS", "pipeline/refinement", "refinement network")
RULES: Registry[Any] = Registry("RULES", "pipeline/labels", "label rule")
SEGMENTATIONS: Registry[Any] = Registry("SEGMENTATIONS", "pipeline/networks", "segmentation network")
BACKBONES: Registry[Any] = Registry("BACKBONES", "pipeline/networks", "backbone")

CHOICES = ("method", "network", "rule")  # the keys of blocks whose value is a ``Choice``


def plain(value: Any) -> Any:
    """Convert a block to JSON types: dataclasses to mappings, tuples to lists, a choice to ``{NAME: settings}``.

    Execution options (``EXECUTION``) are left out, since no result depends on them.
    """
    if isinstance(value, Choice):
        return {value.name: plain(value.settings)}
    if dataclasses.is_dataclass(value):
        fields = (field for field in dataclasses.fields(value) if field.init and field.metadata != EXECUTION)
        return {field.name: plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
