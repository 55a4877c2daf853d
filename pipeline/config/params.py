"""Read params.yaml and its profiles into ``schema.Params``. All faults are reported together, one per line."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import yaml

from pipeline.config import references, table_rows
from pipeline.config.reader import Faults, build_block, did_you_mean, prefixed, quoted
from pipeline.config.registry import CHOICES, Choice
from pipeline.config.schema import Params, backbones
from pipeline.config.stage_table import SECTIONS
from pipeline.config.validation import contradictions, possible_rows
from pipeline.config.variants import expand
from pipeline.errors import PipelineError

_T = TypeVar("_T")
Notice = Callable[[str], None]


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also rejects duplicate keys. Plain YAML silently keeps the last one.

    A scalar that cannot be converted, such as 2024-99-99, is an error with a line number.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, AttributeError) as error:
            raise yaml.MarkedYAMLError(None, None, f"{quoted(node.value)}: {error}", node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"the key {key.value} appears twice", key.start_mark)
                seen.add(key.value)
        return cast(dict[Any, Any], super().construct_mapping(node, deep))


# Depth in a params file of the keys of a block (SECTION.NAME.KEY) and of its defaults (defaults.SECTION.KEY)
_BLOCK = 2
# Limits on params, far above those of any experiment. Deeper ones would exhaust the stack, and aliases can multiply a
# small file to more values than fit into memory.
DEPTH, VALUES = 20, 100_000


def merge(base: Mapping[str, Any], over: Mapping[str, Any], level: int = 0) -> dict[str, Any]:
    """Merge ``over`` into ``base`` recursively. Values of ``over`` win, including null, which removes a block.

    The settings of a choice (``rule: oaa`` or ``rule: {drs: {alpha: 0.2}}``) are merged only if both mappings name the
    same implementation; otherwise the choice in ``over`` replaces the one in ``base``.

    Args:
        level: depth of both mappings in a params file; 0 is the top.
    """
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if level == _BLOCK and key in CHOICES and _is_choice(below) and _is_choice(value):
            merged[key] = _merge_choice(below, value)
        elif isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = merge(below, value, level + 1)
        else:
            merged[key] = value
    return merged


def _is_choice(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Mapping) and len(value) == 1)


def _merge_choice(base: Any, over: Any) -> Any:
    below, above = ({side: None} if isinstance(side, str) else side for side in (base, over))
    (name,) = above
    if name not in below or (isinstance(base, str) and isinstance(over, str)):
        return over
    settings = merge(below[name] or {}, above[name] or {}, _BLOCK + 1)
    return {name: settings} if settings else name


def read(files: Sequence[Path], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read the files and merge them in order, then merge ``overrides``. The result is not validated.

    Raises:
        PipelineError: a file is missing, cannot be read, or is not a YAML mapping.
    """
    raw: dict[str, Any] = {}
    for file in files:
        raw = merge(raw, _read_file(file))
    _check_size(overrides or {}, "overrides (--set, --config)")
    return merge(raw, overrides or {})


def _check_size(raw: Any, origin: str) -> None:
    """Raise PipelineError if the values are nested more than ``DEPTH`` levels deep or are more than ``VALUES``."""
    waiting, count = [(raw, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > DEPTH or count > VALUES:
            limit = f"deeper than {DEPTH} levels" if depth > DEPTH else f"into more than {VALUES} values"
            raise PipelineError(f"{origin}: nests {limit}; correct its brackets and aliases")
        if isinstance(value, Mapping | list | tuple | set):
            waiting.extend((item, depth + 1) for item in (value.values() if isinstance(value, Mapping) else value))


def _read_file(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise PipelineError(f"{file}: no such file; name an existing params file") from None
    except UnicodeDecodeError:
        raise PipelineError(f"{file}: not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise PipelineError(f"{file}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise PipelineError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise PipelineError(f"{file}: must be a mapping of parameters")
    _check_size(content, str(file))
    return content


def choice_faults(block: Any, sound: bool = True) -> Iterator[str]:
    """Yield the faults in the settings of a block's choices. If the block is ``sound``, also check the two together."""
    for choice in (value for value in getattr(block, "__dict__", {}).values() if isinstance(value, Choice)):
        try:
            settings = choice.settings
        except PipelineError as error:
            yield from error.lines
            continue
        if sound and (hook := getattr(settings, "faults_in", None)) is not None:
            yield from prefixed(choice.where.rpartition(".")[0], hook(block))


def backbone_faults(block: Any) -> Iterator[str]:
    """Yield the faults of a block's backbones: settings that the network does not support. This imports torch."""
    for key, backbone in backbones(block).items():
        from pipeline.networks.backbones import backbone_faults

        yield from (f"{key}: {line}" for line in backbone_faults(backbone))


class Checks(NamedTuple):
    """The checks that import implementations; a cache may replace them (``pipeline.workflow.settings``)."""

    choices: Callable[[Any, bool], Iterable[str]] = choice_faults
    backbones: Callable[[Any], Iterable[str]] = backbone_faults


CHECKS = Checks()


def load(
    files: Sequence[Path],
    overrides: Mapping[str, Any] | None = None,
    resolve: bool = False,
    every_row: bool = False,
    notice: Notice = lambda line: None,
    checks: Checks = CHECKS,
) -> Params:
    """Read, merge and validate params files; see ``read`` and ``validate``."""
    return validate(read(files, overrides), " + ".join(map(str, files)), resolve, every_row, notice, checks)


def validate(
    raw: Mapping[str, Any],
    origin: str = "params.yaml",
    resolve: bool = False,
    every_row: bool = False,
    notice: Notice = lambda line: None,
    checks: Checks = CHECKS,
) -> Params:
    """Validate a raw mapping against ``schema.Params``, after merging each block over its section's ``defaults``.

    Only the blocks of ``rows`` remain, without rows that need masks or saliency maps that are not there.

    Args:
        origin: the source of the mapping; each fault starts with it.
        resolve: also check the settings of every block's choices, and the backbones of the blocks that remain, which
            imports the methods and networks. Otherwise, each stage checks its own block (``check``).
        every_row: keep all blocks instead.
        notice: called with each line on rows that are left out.
        checks: how settings and backbones are checked.

    Raises:
        PipelineError: the params have faults; it has one line for each.
    """
    raw = dict(raw)
    faults: Faults = []
    defaults = _defaults(raw.pop("defaults", None), faults)
    for section in SECTIONS:
        blocks = raw.get(section)
        if isinstance(blocks, Mapping):
            raw[section] = {
                name: merge(defaults.get(section, {}), block, _BLOCK) if isinstance(block, Mapping) else block
                for name, block in blocks.items()
                if block is not None
            }
    raw |= {section: blocks for section, blocks in _expanded(raw, faults).items() if blocks}
    raw.pop("variants", None)
    params = build_block(Params, raw, "", faults)
    if not faults and params is not None:
        params = table_rows.select(params)
        faults.extend(contradictions(params))
    if resolve and params is not None:
        sound = not faults
        for section in SECTIONS:
            for block in getattr(params, section).values():
                faults.extend(checks.choices(block, sound))
    if faults or params is None:
        raise PipelineError(*(f"{origin}: {fault}" for fault in faults))
    if every_row:
        return params
    chosen = params if params.rows is None else references.keep_rows(params, params.rows)
    remaining = table_rows.trim(possible_rows(chosen, origin, notice))
    if resolve:
        for section in SECTIONS:
            for name, block in getattr(remaining, section).items():
                faults.extend(f"{section}.{name}.{line}" for line in checks.backbones(block))
    if faults:
        raise PipelineError(*(f"{origin}: {fault}" for fault in faults))
    return remaining


def _expanded(raw: Mapping[str, Any], faults: Faults) -> dict[str, dict[str, Any]]:
    """Return the blocks of all sections with those of the variants. A section that is no mapping is left as it is."""
    blocks = expand(raw, lambda block, change: merge(block, change, _BLOCK), faults)
    return {section: found for section, found in blocks.items() if isinstance(raw.get(section, {}), Mapping)}


def check(block: Any, origin: str = "params.yaml") -> None:
    """Validate the settings of a block's choices, both alone and together with the rest of the block.

    Raises:
        PipelineError: the settings have faults; it has one line for each.
    """
    if faults := list(choice_faults(block)):
        raise PipelineError(*(f"{origin}: {fault}" for fault in faults))


def read_block(kind: type[_T], raw: Mapping[str, Any], origin: str) -> _T:
    """Build a block from the mapping that a model file stores.

    Raises:
        PipelineError: the mapping does not fit the schema.
    """
    faults: Faults = []
    built = build_block(kind, raw, "", faults)
    if faults or built is None:
        raise PipelineError(*(f"{origin}: {fault}" for fault in faults))
    return built


def _defaults(value: Any, faults: Faults) -> dict[str, Mapping[str, Any]]:
    """Return the default block of each section. Append a fault for each value that is not a mapping."""
    if not isinstance(value, Mapping | None):
        faults.append(f"defaults: must be a mapping of sections to blocks, not {quoted(value)}")
        return {}
    blocks = {}
    for section, block in (value or {}).items():
        if section not in SECTIONS:
            faults.append(f"defaults.{section}: unknown section{did_you_mean(str(section), SECTIONS)}")
        elif isinstance(block, Mapping):
            blocks[section] = block
        elif block is not None:
            faults.append(f"defaults.{section}: must be a mapping, not {quoted(block)}")
    return blocks
