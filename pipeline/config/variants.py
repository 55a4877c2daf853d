"""Variants: rows that are other rows with changes, as the rows of a paper's table are.

``variants: {NAME: {of: ROW, SECTION: {KEY: VALUE}}}`` copies those blocks of the row ROW that the changes affect, with
all their settings: the block of each SECTION, and every block between it and the row. The other blocks are shared with
ROW. The copies are named NAME, and so is the new row. Variants are expanded once all params files are merged. A profile
of variants therefore lies on any profile, whose sizes, rates and thresholds it inherits.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.reader import BLOCK_NAME, Faults, did_you_mean, quoted
from pipeline.config.stage_table import FOLDERS, SECTIONS

Block = Mapping[str, Any]
Blocks = dict[str, dict[str, Any]]  # section -> name -> block
Merge = Callable[[Block, Block], dict[str, Any]]
NETWORKS = ("segmentations", "one_step")  # the sections whose blocks are rows
RELATIVE = ("lengths", "batches")
KEYS = ("of", *RELATIVE, *SECTIONS)
LEAST, MOST = 0.01, 100  # factors of ``lengths``


@dataclass(frozen=True)
class _Row:
    """The blocks that a changed row is derived from, each with its changes, by reference; and what they refer to."""

    network: str
    blocks: dict[str, Block]
    sources: dict[str, list[str]]
    changed: set[str]

    def copied(self) -> list[str]:
        """The blocks that the variant copies, the nearest to the row first: its network and each changed block, and
        those derived from one of them.
        """
        copied = {self.network, *self.changed}
        while more := {name for name, needs in self.sources.items() if copied.intersection(needs)} - copied:
            copied |= more
        return [reference for reference in self.blocks if reference in copied]


def expand(raw: Mapping[str, Any], merge: Merge, faults: Faults) -> Blocks:
    """Return the blocks of all sections, and those of the variants that ``rows`` or a table names.

    Args:
        raw: the params, whose blocks have their defaults; a section that is not a mapping has no blocks.
        merge: merges changes into a block.
        faults: receives a line for each variant that cannot be expanded.
    """
    blocks: Blocks = {key: dict(value) if isinstance(value := raw.get(key), Mapping) else {} for key in SECTIONS}
    variants = raw.get("variants")
    if not isinstance(variants, Mapping | None):
        faults.append(f"variants: must be a mapping of names to variants, not {quoted(variants)}")
        return blocks
    defined = {name: value for name, value in (variants or {}).items() if value is not None}
    waiting: dict[str, Any] = {}
    named = _named(raw)
    while more := named & defined.keys() - waiting.keys():
        waiting |= {name: value for name, value in defined.items() if name in more}
        named = {needed for name in more for needed in _needs(name, defined[name])}
    while ready := [name for name, value in waiting.items() if not _needs(name, value) & waiting.keys()]:
        for name in ready:
            _add(blocks, name, waiting.pop(name), merge, faults)
    faults.extend(f"variants.{name}: is a variant of itself; set of to another row" for name in waiting)
    return blocks


def _named(raw: Mapping[str, Any]) -> set[str]:
    """Return the rows that ``rows`` and the tables name, in params that have not been validated."""
    rows, tables = raw.get("rows"), raw.get("tables")
    named = {row for row in rows if isinstance(row, str)} if isinstance(rows, list | tuple) else set()
    for table in tables.values() if isinstance(tables, Mapping) else ():
        entries = table.get("rows") if isinstance(table, Mapping) else None
        for name, entry in entries.items() if isinstance(entries, Mapping) else ():
            other = entry.get("rows") if isinstance(entry, Mapping) else None
            named |= {name, *map(str, other.values() if isinstance(other, Mapping) else ())}
    return named


def _needs(name: str, value: Any) -> set[str]:
    """Return the rows, or names of other blocks, that a variant is derived from or refers to."""
    if not isinstance(value, Mapping):
        return set()
    changes = (value[section] for section in SECTIONS if isinstance(value.get(section), Mapping))
    values = (item for change in changes for item in change.values())
    named = {item.rpartition("/")[2] for item in values if isinstance(item, str) and "/" in item}
    return {str(value.get("of")), *(named - {name})}


def _add(blocks: Blocks, name: str, value: Any, merge: Merge, faults: Faults) -> None:
    """Add the copies of a variant, or its faults."""
    where = f"variants.{name}"
    if lines := list(_faults(blocks, name, value)):
        faults.extend(f"{where}{line}" for line in lines)
        return
    changes = {section: value[section] or {} for section in SECTIONS if section in value}
    relative = {key: value.get(key) or {} for key in RELATIVE}
    row = _changed_row(blocks, value["of"], changes, relative, merge)
    present = {reference.split("/")[0] for reference in row.blocks}
    named = {**changes, **relative["lengths"], **relative["batches"]}
    if lacking := [section for section in named if section not in present]:
        has = ", ".join(row.blocks)
        faults.extend(f"{where}: the row {value['of']} has no block in {key}; it consists of {has}" for key in lacking)
        return
    names: dict[str, str] = {}
    for reference in row.copied():
        section, old = reference.split("/")
        taken = any(other.startswith(f"{section}/") for other in names.values())
        names[reference] = f"{section}/{name}_{old}" if taken else f"{section}/{name}"
    for reference, new in names.items():
        section, copy = new.split("/")
        if copy in blocks[section]:
            faults.append(f"{where}: {section} has a block of this name; choose another name")
        block = dict(row.blocks[reference])
        renamed = {old: copy for old, copy in names.items() if old != reference}  # a change may name the block itself
        block |= {key: renamed[block[key]] for key in _keys(section) if block.get(key) in renamed}
        blocks[section][copy] = block


def _faults(blocks: Blocks, name: Any, value: Any) -> Iterator[str]:
    """Yield the faults of a variant by itself, each as the rest of a line."""
    if not isinstance(name, str) or BLOCK_NAME.fault(name):
        yield f": a variant's name consists of {BLOCK_NAME.rule}"
    if not isinstance(value, Mapping):
        yield f": must be a mapping, not {quoted(value)}"
        return
    rows = {row for section in NETWORKS for row in blocks[section]}
    if "of" not in value:
        yield ".of: is missing; name the row that it changes"
    elif value["of"] not in rows:
        yield f".of: {quoted(value['of'])} is no row{did_you_mean(str(value['of']), rows)}"
    for key, item in value.items():
        if key not in KEYS:
            yield f".{key}: unknown key{did_you_mean(str(key), KEYS)}"
        elif key != "of" and not isinstance(item, Mapping | None):
            yield f".{key}: must be a mapping, not {quoted(item)}"
    for key in RELATIVE:
        numbers = value.get(key)
        for section, number in numbers.items() if isinstance(numbers, Mapping) else ():
            kinds = int | float if key == "lengths" else int
            if section not in SECTIONS:
                yield f".{key}.{section}: unknown section{did_you_mean(str(section), SECTIONS)}"
            elif not isinstance(number, kinds) or isinstance(number, bool) or not LEAST <= number <= MOST:
                kind = "number" if key == "lengths" else "whole number"
                yield f".{key}.{section}: {quoted(number)} must be a {kind} from {LEAST:g} to {MOST:g}"


def _changed_row(blocks: Blocks, row: str, changes: Block, relative: Mapping[str, Block], merge: Merge) -> _Row:
    """Follow the references from the network of a row, and change the block of each section that comes first."""
    network = next(f"{section}/{row}" for section in NETWORKS if row in blocks[section])
    found = _Row(network, {}, {}, set())
    queue, left = [network], {*changes, *relative["lengths"], *relative["batches"]}
    while queue:
        reference = queue.pop(0)
        section, _, name = reference.partition("/")
        block = blocks.get(section, {}).get(name)
        if reference in found.blocks or not isinstance(block, Mapping):
            continue
        if section in left:
            left.remove(section)
            block = _rescaled(
                merge(block, changes.get(section, {})), *(relative[key].get(section, 1) for key in RELATIVE)
            )
            found.changed.add(reference)
        found.blocks[reference] = block
        found.sources[reference] = [str(block[key]) for key in _keys(section) if key in block]
        queue.extend(found.sources[reference])
    for reference, sources in found.sources.items():  # ground_truth, for instance, is no block
        found.sources[reference] = [source for source in sources if source in found.blocks]
    return found


def _keys(section: str) -> list[str]:
    """Return the keys of a section's blocks that refer to other blocks."""
    return [read.key for read in FOLDERS[section].reads.values() if read.key]


def _rescaled(block: dict[str, Any], length: float, group: int) -> dict[str, Any]:
    """Return the block with ``length`` times the epochs or iterations, and with batches of a multiple of ``group``.

    Milestones are moved as much.
    """
    training = block.get("training")
    if not isinstance(training, Mapping):
        return block
    changed = dict(training)
    for key in ("epochs", "iterations"):
        if isinstance(number := training.get(key), int):
            changed[key] = max(1, round(number * length))
    if isinstance(milestones := training.get("milestones"), list | tuple):
        changed["milestones"] = [round(at * length) if isinstance(at, int | float) else at for at in milestones]
    if isinstance(size := training.get("batch_size"), int):
        changed["batch_size"] = -(-size // group) * group
    return {**block, "training": changed}
