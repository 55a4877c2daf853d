"""Every number of params.yaml has a range beside its field, and a value outside of it is refused in one line."""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import pytest

from pipeline.config.reader import Range, build
from pipeline.config.registry import Registry
from pipeline.config.schema import Params

SPECIAL = (float("nan"), float("inf"), -float("inf"))
Wrap = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Number:
    """A number that a field holds: ``wrap`` makes a whole value of the field from it."""

    kind: type
    range: Range | None
    wrap: Wrap


def blocks(kind: type) -> Iterator[type]:
    """The dataclasses that ``kind`` is made of, itself first, and the settings of every registered implementation."""
    yield kind
    for hint in typing.get_type_hints(kind, include_extras=True).values():
        yield from parts(hint)


def parts(hint: Any) -> Iterator[type]:
    for inner in typing.get_args(hint):
        if isinstance(inner, Registry):
            entries = (inner[name] for name in inner.names() if inner.file(name))
            yield from (part for entry in entries for part in blocks(getattr(entry, "Settings", entry)))
        yield from parts(inner)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield from blocks(hint)


def numbers(hint: Any, wrap: Wrap = lambda value: value) -> Iterator[Number]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated and arguments[0] in (int, float):
        yield Number(arguments[0], next((item for item in arguments[1:] if isinstance(item, Range)), None), wrap)
    elif hint in (int, float):
        yield Number(hint, None, wrap)
    elif origin in (types.UnionType, typing.Union):
        for argument in arguments:
            yield from numbers(argument, wrap)
    elif origin is tuple and arguments[-1] is Ellipsis:
        yield from numbers(arguments[0], lambda value: wrap([value]))
    elif origin is tuple:
        for at, argument in enumerate(arguments):
            yield from numbers(argument, lambda value, at=at: wrap(around(arguments, at, value)))  # type: ignore[misc]


def around(kinds: Any, at: int, value: Any) -> list[Any]:
    """A list of which all items but the one ``at`` are right."""
    fitting = [inside(number.range) for kind in kinds for number in numbers(kind)]
    return [*fitting[:at], value, *fitting[at + 1 :]]


def inside(limits: Range | None) -> float:
    assert limits is not None
    return next(value for value in (1, 0, 4, 0.25) if limits.fault(value) is None)


def outside(limits: Range) -> list[float]:
    """Just beyond each bound, and far."""
    inclusive = [(limits.least, -1), (limits.most, 1)]
    exclusive = [(limits.above, -1), (limits.below, 1)]
    beyond = [bound + side * distance for bound, side in inclusive for distance in (0.001, 1, 1000)]
    beyond += [bound + side * distance for bound, side in exclusive for distance in (0, 1, 1000)]
    return [value for value in beyond if abs(value) < float("inf")]


FIELDS = {
    f"{block.__qualname__}.{field.name}": typing.get_type_hints(block, include_extras=True)[field.name]
    for block in dict.fromkeys(blocks(Params))
    for field in dataclasses.fields(block)
}
NUMBERS = {name: found for name, hint in FIELDS.items() if (found := list(numbers(hint)))}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_outside_of_its_range_is_refused_by_key(name: str) -> None:
    for number in NUMBERS[name]:
        assert number.range is not None, f"{name} accepts any number"
        drawn = [value for value in outside(number.range) if number.kind is float or float(value).is_integer()]
        drawn += SPECIAL if number.kind is float else ()
        assert len(drawn) >= 2
        for value in drawn:
            faults: list[str] = []
            build(FIELDS[name], number.wrap(number.kind(value)), "block.key", faults)
            assert len(faults) == 1, (name, value)
            assert faults[0].startswith("block.key"), (name, value)
            assert "must be" in faults[0] or "not finite" in faults[0]


def test_the_walk_reaches_all_blocks_and_settings() -> None:
    reached = {name.rpartition(".")[0] for name in NUMBERS}
    assert {"Params", "Demo", "Training", "Crf", "Test", "Climbing", "Amr.Settings", "Agen.Settings"} <= reached
    assert {"IntegralModel.Settings", "Edam.Settings", "Mixture", "Head", "Walk"} <= reached
