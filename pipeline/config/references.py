"""The references between the blocks of params.yaml, which say which block is derived from which."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from pipeline.config.schema import Params, PseudoLabels
from pipeline.config.stage_table import FOLDERS, SECTIONS

Needs = Mapping[str, tuple[str, ...]]  # SECTION/NAME -> the references of that block


def sources(params: Params) -> Needs:
    """Map each block to its references. Networks that learn from tags alone have none."""
    keys = {section: [read.key for read in FOLDERS[section].reads.values() if read.key] for section in SECTIONS}
    return {
        f"{section}/{name}": tuple(getattr(block, key) for key in keys[section])
        for section in SECTIONS
        for name, block in getattr(params, section).items()
    }


def dangling(params: Params) -> Iterator[str]:
    """Yield a fault for each reference to a block that does not exist or whose section the key does not allow."""
    for section in SECTIONS:
        for read in FOLDERS[section].reads.values():
            choices = {
                reference
                for target in read.allowed
                for reference in (
                    (f"{target}/{name}" for name in getattr(params, target)) if target in SECTIONS else (target,)
                )
            }
            for name, block in getattr(params, section).items() if read.key else ():
                if (reference := getattr(block, read.key)) not in choices:
                    allowed = ", ".join(sorted(choices))
                    yield f"{section}.{name}.{read.key}: refers to {reference}, which is none of {allowed}"


def topological_order(params: Params) -> list[str]:
    """Return all blocks, each after those that it refers to. Blocks on a cycle, or after one, are left out."""
    waiting = dict(sources(params))
    ready: list[str] = []
    while now := [name for name, needs in waiting.items() if not any(need in waiting for need in needs)]:
        ready += now
        for name in now:
            del waiting[name]
    return ready


def rows(params: Params) -> dict[str, str]:
    """Map the name of each row of the report to its network, SECTION/NAME. predictions/ROW holds its masks.

    The rows follow the order of ``params.rows`` if it is set. Otherwise, segmentation networks come first, then
    one-step networks, then the supervised upper bounds.
    """
    bounds = {name for name, block in params.segmentations.items() if block.labels == "ground_truth"}
    networks = {name: f"segmentations/{name}" for name in params.segmentations if name not in bounds}
    networks |= {name: f"one_step/{name}" for name in params.one_step}
    networks |= {name: f"segmentations/{name}" for name in params.segmentations if name in bounds}
    return {name: networks[name] for name in (*(params.rows or ()), *networks) if name in networks}


def label_rule(params: Params, labels: str) -> PseudoLabels | None:
    """Return the block of the pseudo labels that a segmentation or its mixture uses; None for ground truth."""
    section, _, name = labels.partition("/")
    if section == "mixtures":
        return label_rule(params, params.mixtures[name].labels)
    return params.pseudo_labels[name] if section == "pseudo_labels" else None


def chains(params: Params) -> dict[str, dict[str, str]]:
    """Map each row to the references of the maps, labels and predictions that its scores come from."""
    found: dict[str, dict[str, str]] = {}
    for name in rows(params):
        found[name] = {"predictions": f"predictions/{name}"}
        if name in params.segmentations:
            labels = found[name]["labels"] = params.segmentations[name].labels
            if rule := label_rule(params, labels):
                found[name]["maps"] = rule.source
    return found


def derived_from(params: Params, references: Sequence[str]) -> set[str]:
    """Return the references themselves and all those that their blocks are derived from."""
    needs = sources(params)
    wanted: set[str] = set()
    queue = list(references)
    while queue:
        reference = queue.pop()
        if reference not in wanted:
            wanted.add(reference)
            queue.extend(needs.get(reference, ()))
    return wanted


def keep_rows(params: Params, kept: Sequence[str]) -> Params:
    """Restrict the params to the rows named in ``kept``, all boxes, and the blocks that these are derived from."""
    networks = [network for name, network in rows(params).items() if name in kept]
    wanted = derived_from(params, [*networks, *(f"boxes/{name}" for name in params.boxes)])
    parts = {
        section: {name: block for name, block in getattr(params, section).items() if f"{section}/{name}" in wanted}
        for section in SECTIONS
    }
    return replace(params, **parts)  # type: ignore[arg-type]


def first_rows(params: Params) -> Params | None:
    """Restrict the params to the rows to run first, with ``seed`` alone, without boxes; None if there are no others."""
    every = rows(params)
    first = tuple(name for name in params.first if name in every)
    if not first or len(first) == len(every):
        return None
    method = params.method if params.method in first else first[0]
    return keep_rows(replace(params, rows=first, first=(), seeds=None, method=method, boxes={}), first)


def cycle(params: Params) -> list[str]:
    """Find a cycle: blocks that each refer to the next, where the last equals the first. Empty if there is none."""
    ordered = set(topological_order(params))
    waiting = {name: needs for name, needs in sources(params).items() if name not in ordered}
    seen: list[str] = []
    following = next(iter(waiting), None)
    while following is not None and following not in seen:
        seen.append(following)
        following = next(need for need in waiting[following] if need in waiting)
    return [*seen[seen.index(following) :], following] if following is not None else []


def ancestors(params: Params, reference: str) -> list[str]:
    """Return the ancestors of a block and the block itself, following the first reference of each; root first."""
    needs = sources(params)
    chain = [reference]
    while parents := needs.get(chain[0]):
        chain.insert(0, parents[0])
    return chain
