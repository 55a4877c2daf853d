"""Strict conversion of plain values (YAML, JSON) into annotated dataclasses. All faults are collected in one pass.

A dataclass annotates its fields with types, ranges and patterns (``Annotated[float, Range(above=0)]``). It may define
``faults()``, which yields one line for each inconsistency among its values; the line starts with the key at fault.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Protocol, TypeVar

_T = TypeVar("_T")
Faults = list[str]


@dataclasses.dataclass(frozen=True)
class Range:
    """The range of numbers that a field accepts.

    ``least`` and ``most`` are inclusive bounds, ``above`` and ``below`` are exclusive.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def fault(self, value: float) -> str | None:
        """Say why ``value`` is rejected; None if it is accepted. Infinities and NaN are always rejected."""
        if not math.isfinite(value):
            return f"{value} is not finite"
        inside = self.least <= value <= self.most and self.above < value < self.below
        return None if inside else f"{value} must be {self}"

    def __str__(self) -> str:
        bounds = [
            f"{relation} {bound:.12g}"
            for relation, bound in (
                ("at least", self.least),
                ("above", self.above),
                ("at most", self.most),
                ("below", self.below),
            )
            if math.isfinite(bound)
        ]
        return " and ".join(bounds)


@dataclasses.dataclass(frozen=True)
class Pattern:
    """The texts that a field accepts: those that ``regex`` matches as a whole. ``rule`` describes them in messages."""

    regex: str
    rule: str

    def fault(self, value: str) -> str | None:
        """Say why ``value`` is rejected; None if it is accepted."""
        return None if re.fullmatch(self.regex, value) else f"{quoted(value)} must be {self.rule}"


Share = Annotated[float, Range(least=0, most=1)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(least=0)]
Scale = Annotated[float, Range(least=0.05, most=10)]  # of an image's sides; beyond, nothing is left or memory ends
Count = Annotated[int, Range(least=1)]
NonNegativeInt = Annotated[int, Range(least=0)]
LARGEST = 2**32 - 1  # of all whole numbers: libraries store them in C integers
# Both become file names, parts of commands and names of DVC's stages. The rules leave nothing that a shell interprets.
BLOCK_NAME = Pattern(r"[A-Za-z0-9_]{1,100}", "1 to 100 ASCII letters, digits and '_'")
FolderName = Annotated[
    str,
    Pattern(
        r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}",
        "1 to 100 ASCII letters, digits, '_', '-' and '.', and must not start with '-' or '.'",
    ),
]
# Of users' own files. Snakemake reads braces as wildcards and has no escape for them.
FilePath = Annotated[str, Pattern(r"[^{}]+", "a path without braces")]


@typing.runtime_checkable
class Readable(Protocol):
    """Metadata of an ``Annotated`` field that converts the field's value itself."""

    def read(self, value: Any, where: str, faults: Faults) -> Any:
        """Return the value to store. Append a line to ``faults`` if the value is invalid."""


def build(kind: Any, value: Any, where: str, faults: Faults) -> Any:
    """Convert ``value`` to the annotated type ``kind``. Append a line to ``faults`` for each invalid value.

    Args:
        where: full key of the value, such as 'classifiers.cam.training'; each fault starts with it.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _annotated(arguments[0], arguments[1:], value, where, faults)
    if dataclasses.is_dataclass(kind):
        return build_block(typing.cast(type, kind), value, where, faults)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return build(next(a for a in arguments if a is not types.NoneType), value, where, faults)
    if origin is typing.Literal:
        if value not in arguments or isinstance(value, bool):
            choices = ", ".join(map(str, arguments))
            faults.append(f"{where}: {value!r} is none of {choices}{did_you_mean(str(value), map(str, arguments))}")
        return value
    if origin is dict:
        return _mapping(arguments[1], value, where, faults)
    if origin is tuple:
        size = None if arguments[-1] is Ellipsis else len(arguments)
        if not isinstance(value, Sequence) or isinstance(value, str) or (size and len(value) != size):
            faults.append(f"{where}: must be a list{f' of {size} values' if size else ''}, not {quoted(value)}")
            return ()
        kinds = arguments if size else [arguments[0]] * len(value)
        items = enumerate(zip(kinds, value, strict=True))
        return tuple(build(kind, item, f"{where}[{i}]", faults) for i, (kind, item) in items)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        faults.append(f"{where}: must be {_type_name(kind)}, not {quoted(value)}")
    elif kind is float and not math.isfinite(value):
        faults.append(f"{where}: {value} is not finite")
    elif kind is int and abs(value) > LARGEST:
        faults.append(f"{where}: {quoted(value)} must be at most {LARGEST}")
    elif kind is str and not _is_encodable(value):
        faults.append(f"{where}: {quoted(value)} must be UTF-8 text without null characters")
    return value


def _is_encodable(text: str) -> bool:
    """Whether a path or a file may contain the text."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _annotated(kind: Any, metadata: tuple[Any, ...], value: Any, where: str, faults: Faults) -> Any:
    for item in metadata:
        if isinstance(item, Readable):
            return item.read(value, where, faults)
    before = len(faults)
    built = build(kind, value, where, faults)
    if len(faults) == before and built is not None:
        for item in metadata:
            if isinstance(item, Range | Pattern) and (fault := item.fault(built)):
                faults.append(f"{where}: {fault}")
    return built


def _mapping(kind: Any, value: Any, where: str, faults: Faults) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        faults.append(f"{where}: must be a mapping of names to blocks, not {quoted(value)}")
        return {}
    for name in value:
        if not isinstance(name, str) or BLOCK_NAME.fault(name):
            faults.append(f"{where}.{name}: a block's name consists of {BLOCK_NAME.rule}")
    present = {name: block for name, block in value.items() if block is not None}  # a null removes a block
    return {name: build(kind, block, f"{where}.{name}", faults) for name, block in present.items()}


def build_block(kind: type[_T], value: Any, where: str, faults: Faults) -> _T | None:
    """Build a dataclass from a mapping. Its ``faults()`` hook is called only if all its fields are valid."""
    if not isinstance(value, Mapping):
        faults.append(f"{where}: must be a mapping, not {quoted(value)}")
        return None
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, kind)) if field.init}
    dot = f"{where}." if where else ""
    before = len(faults)
    for key in value:
        if key not in fields:
            faults.append(f"{dot}{key}: unknown key{did_you_mean(str(key), fields)}")
    arguments = {key: build(hints[key], value[key], f"{dot}{key}", faults) for key in fields if key in value}
    for name, field in fields.items():
        if name not in arguments and _is_required(field):
            faults.append(f"{dot}{name}: is missing")
            return None
    built = kind(**arguments)
    if len(faults) == before and (hook := getattr(built, "faults", None)) is not None:
        faults.extend(prefixed(where, hook()))
    return built


def prefixed(where: str, lines: Iterable[str]) -> Iterator[str]:
    """Prefix the faults of a block with its full key. A fault of the block as a whole starts with ': '."""
    for line in lines:
        yield f"{where}{line}" if line.startswith(":") or not where else f"{where}.{line}"


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return '; did you mean X?' if a choice is similar to ``word``, else ''."""
    close = difflib.get_close_matches(word, list(choices), 1)
    return f"; did you mean {close[0]}?" if close else ""


def _type_name(kind: type) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(kind, kind.__name__)


def quoted(value: Any) -> str:
    """Format a value for a message: None becomes 'null', and long values are truncated."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"  # Python does not print numbers of thousands of digits
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
