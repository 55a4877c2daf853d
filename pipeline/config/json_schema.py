"""A JSON Schema of params files, which lets editors complete and check them.

``python -m pipeline.config.json_schema > params.schema.json`` generates it. Line 1 of each params file names it.
It describes types, ranges and names. Contradictions between values are found when a run is planned.
"""

import dataclasses
import json
import math
import re
import types
import typing
from typing import Annotated, Any

from pipeline.config.reader import Pattern, Range
from pipeline.config.registry import Name, Registry
from pipeline.config.schema import Params
from pipeline.config.stage_table import SECTIONS
from pipeline.config.variants import LEAST, MOST
from pipeline.errors import exit_on_faults

Schema = dict[str, Any]
_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}
_BOUNDS = {"least": "minimum", "most": "maximum", "above": "exclusiveMinimum", "below": "exclusiveMaximum"}


def params_schema() -> Schema:
    """Return the schema of a params file or profile. No key is required, since several files are merged."""
    blocks: dict[str, Schema] = {}
    top = _fields(Params, blocks)
    sections = {section: top["properties"][section]["additionalProperties"] for section in SECTIONS}
    top["properties"]["defaults"] = _object(sections)
    factor: Schema = {"type": "number", "minimum": LEAST, "maximum": MOST}
    lengths = _object(dict.fromkeys(SECTIONS, factor))
    whole: Schema = {**factor, "type": "integer"}
    batches = _object(dict.fromkeys(SECTIONS, whole))
    variant = _object({"of": {"type": ["string", "null"]}, "lengths": lengths, "batches": batches, **sections})
    top["properties"]["variants"] = _object({}, variant)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "params.yaml", **top, "$defs": blocks}


def _schema(kind: Any, blocks: dict[str, Schema]) -> Schema:
    """Return the schema of an annotated type as ``reader.build`` reads it. Null is valid, since it removes a key.

    Args:
        blocks: receives the schema of each dataclass under its name.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _annotated(arguments[0], arguments[1:], blocks)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, blocks)
    if origin in (types.UnionType, typing.Union):
        return {
            "anyOf": [_schema(argument, blocks) for argument in arguments if argument is not types.NoneType] + [_NULL]
        }
    if origin is typing.Literal:
        return {"enum": [*arguments, None]}
    if origin is dict:
        return _object({}, _schema(arguments[1], blocks))
    if origin is tuple:
        return {"type": ["array", "null"], "items": _schema(arguments[0], blocks)}
    return {"type": [_PLAIN[kind], "null"]}


_NULL: Schema = {"type": "null"}


def _annotated(kind: Any, metadata: tuple[Any, ...], blocks: dict[str, Schema]) -> Schema:
    for item in metadata:
        if isinstance(item, Registry):
            return _choice(item, blocks)
        if isinstance(item, Name):
            names: Schema = {"enum": [*item.registry.names(), None]}
            families = [{"type": "string", "pattern": f"^{re.escape(name)}."} for name in item.registry.families()]
            return {"anyOf": [names, *families]} if families else names
        if isinstance(item, Range):
            bounds = {_BOUNDS[key]: value for key, value in vars(item).items() if math.isfinite(value)}
            return _schema(kind, blocks) | bounds
        if isinstance(item, Pattern):
            return _schema(kind, blocks) | {"pattern": f"^{item.regex}$"}
    return _schema(kind, blocks)


def _choice(registry: Registry[Any], blocks: dict[str, Schema]) -> Schema:
    """``NAME`` or ``{NAME: settings}``."""
    entries = {name: registry[name] for name in registry.names()}
    settings = {name: _dataclass(getattr(entry, "Settings", entry), blocks) for name, entry in entries.items()}
    return {"anyOf": [{"enum": list(entries)}, _object(settings) | {"maxProperties": 1}, _NULL]}


def _dataclass(kind: Any, blocks: dict[str, Schema]) -> Schema:
    name = kind.__qualname__
    if name not in blocks:
        blocks[name] = _fields(kind, blocks)
    return {"$ref": f"#/$defs/{name}"}


def _fields(kind: Any, blocks: dict[str, Schema]) -> Schema:
    hints = typing.get_type_hints(kind, include_extras=True)
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    return _object({name: _schema(hints[name], blocks) for name in names}) | _described(kind)


def _described(kind: Any) -> Schema:
    text = (kind.__doc__ or "").split("\n\n")[0]
    return {} if text.startswith(f"{kind.__name__}(") else {"description": " ".join(text.split())}


def _object(properties: dict[str, Schema], additional: Schema | bool = False) -> Schema:
    return {"type": ["object", "null"], "properties": properties, "additionalProperties": additional}


if __name__ == "__main__":
    with exit_on_faults():
        print(json.dumps(params_schema(), indent=1))
