"""params.yaml -> ``schema.Params``: merged, checked whole, every fault a line of its own."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline import references
from pipeline.contradictions import SECTIONS, contradictions
from pipeline.errors import PipelineError
from pipeline.schema import Params

_T = typing.TypeVar("_T")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``, mapping by mapping; a null removes what it names."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def read(files: Sequence[Path], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The raw mapping of params.yaml with profiles and overrides laid on it, in order.

    Raises:
        PipelineError: a file is missing or no YAML mapping.
    """
    raw: dict[str, Any] = {}
    for file in files:
        try:
            found = yaml.safe_load(file.read_text())
        except FileNotFoundError:
            raise PipelineError(f"{file}: no such file; name a params file that exists") from None
        except yaml.YAMLError as error:
            raise PipelineError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(found, dict):
            raise PipelineError(f"{file}: holds no mapping of parameters")
        raw = merge(raw, found)
    return merge(raw, overrides or {})


def load(files: Sequence[Path], overrides: Mapping[str, Any] | None = None) -> Params:
    """Read, merge, check.

    Raises:
        PipelineError: with every fault found, a line each.
    """
    return validate(read(files, overrides), " + ".join(map(str, files)))


def validate(raw: Mapping[str, Any], origin: str = "params.yaml") -> Params:
    """Check a raw mapping against ``schema.Params``; each block gets its section's entry of ``defaults`` first."""
    raw = dict(raw)
    faults: list[str] = []
    defaults = _defaults(raw.pop("defaults", None), faults)
    for section in SECTIONS:
        blocks = raw.get(section)
        if isinstance(blocks, Mapping):
            raw[section] = {
                name: merge(defaults.get(section, {}), block) if isinstance(block, Mapping) else block
                for name, block in blocks.items()
                if block is not None
            }
    params = _build(Params, raw, "", faults)
    if not faults:
        faults.extend(contradictions(params))
    if faults:
        raise PipelineError(*(f"{origin}: {fault}" for fault in faults))
    checked = typing.cast(Params, params)
    return checked if checked.rows is None else references.only(checked, checked.rows)


def block(kind: type[_T], raw: Mapping[str, Any], origin: str) -> _T:
    """One block from its mapping, as a model file keeps it.

    Raises:
        PipelineError: it does not fit the schema.
    """
    faults: list[str] = []
    built = _build_block(kind, raw, "", faults)
    if faults or built is None:
        raise PipelineError(*(f"{origin}: {fault}" for fault in faults))
    return built


def _defaults(value: Any, faults: list[str]) -> dict[str, Mapping[str, Any]]:
    """What ``defaults`` holds for each section; what is no mapping is added to ``faults``."""
    if not isinstance(value, Mapping | None):
        faults.append(f"defaults: must be a mapping of sections to blocks, not {_said(value)}")
        return {}
    found = {}
    for section, block in (value or {}).items():
        if section not in SECTIONS:
            faults.append(f"defaults.{section}: unknown section{_near(str(section), SECTIONS)}")
        elif isinstance(block, Mapping):
            found[section] = block
        elif block is not None:
            faults.append(f"defaults.{section}: must be a mapping, not {_said(block)}")
    return found


def _build(kind: Any, value: Any, where: str, faults: list[str]) -> Any:
    """``value`` as an instance of the annotation ``kind``; what does not fit is added to ``faults``."""
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build_block(typing.cast(type, kind), value, where, faults)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _build(next(a for a in arguments if a is not types.NoneType), value, where, faults)
    if origin is typing.Literal:
        if value not in arguments or isinstance(value, bool):
            choices = ", ".join(map(str, arguments))
            faults.append(f"{where}: {value!r} is none of {choices}{_near(str(value), map(str, arguments))}")
        return value
    if origin is dict:
        if not isinstance(value, Mapping):
            faults.append(f"{where}: must be a mapping of names to blocks, not {_said(value)}")
            return {}
        for name in value:
            if not (isinstance(name, str) and name.replace("_", "").isalnum()):
                faults.append(f"{where}.{name}: a block's name is made of letters, digits and '_'")
        return {name: _build(arguments[1], block, f"{where}.{name}", faults) for name, block in value.items()}
    if origin is tuple:
        size = None if arguments[-1] is Ellipsis else len(arguments)
        if not isinstance(value, Sequence) or isinstance(value, str) or (size and len(value) != size):
            faults.append(f"{where}: must be a list{f' of {size} numbers' if size else ''}, not {_said(value)}")
            return ()
        return tuple(_build(arguments[0], item, f"{where}[{i}]", faults) for i, item in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        faults.append(f"{where}: must be {_word(kind)}, not {_said(value)}")
    return value


def _build_block(kind: type[_T], value: Any, where: str, faults: list[str]) -> _T | None:
    if not isinstance(value, Mapping):
        faults.append(f"{where}: must be a mapping, not {_said(value)}")
        return None
    hints = typing.get_type_hints(kind)
    dot = f"{where}." if where else ""
    for key in value:
        if key not in hints:
            faults.append(f"{dot}{key}: unknown key{_near(str(key), hints)}")
    arguments = {key: _build(hints[key], value[key], f"{dot}{key}", faults) for key in hints if key in value}
    for member in dataclasses.fields(typing.cast(Any, kind)):
        if member.name not in arguments and _required(member):
            faults.append(f"{dot}{member.name}: is missing")
            return None
    return kind(**arguments)


def _required(member: "dataclasses.Field[Any]") -> bool:
    return member.default is dataclasses.MISSING and member.default_factory is dataclasses.MISSING


def _near(word: str, choices: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(choices), 1)
    return f"; did you mean {close[0]}?" if close else ""


def _word(kind: type) -> str:
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(kind, kind.__name__)


def _said(value: Any) -> str:
    return "null" if value is None else repr(value)
