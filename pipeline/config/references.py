"""Which block is derived from which: the references between the blocks of params.yaml."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from pipeline.config.schema import Params, PseudoLabels
from pipeline.config.stage_table import FOLDERS, SECTIONS

Needs = Mapping[str, tuple[str, ...]]  # SECTION/NAME -> what the block refers to


def sources(params: Params) -> Needs:
    """What each block of each section refers to; nothing for the networks that learn from tags alone."""
    keys = {section: [read.key for read in FOLDERS[section].reads.values() if read.key] for section in SECTIONS}
    return {
        f"{section}/{name}": tuple(getattr(block, key) for key in keys[section])
        for section in SECTIONS
        for name, block in getattr(params, section).items()
    }


def dangling(params: Params) -> Iterator[str]:
    """A line for each reference to a block that does not exist, or that is not of a section that the key allows."""
    for section in SECTIONS:
        for read in FOLDERS[section].reads.values():
            choices = {
                reference
                for target in read.of
                for reference in (
                    (f"{target}/{name}" for name in getattr(params, target)) if target in SECTIONS else (target,)
                )
            }
            for name, block in getattr(params, section).items() if read.key else ():
                if (reference := getattr(block, read.key)) not in choices:
                    allowed = ", ".join(sorted(choices))
                    yield f"{section}.{name}.{read.key}: refers to {reference}, which is none of {allowed}"


def in_order(params: Params) -> list[str]:
    """All blocks, each after those that it refers to. Those of a circle are left out."""
    waiting = dict(sources(params))
    ready: list[str] = []
    while now := [name for name, needs in waiting.items() if not any(need in waiting for need in needs)]:
        ready += now
        for name in now:
            del waiting[name]
    return ready


def rows(params: Params) -> dict[str, str]:
    """The network of each row of the report, SECTION/NAME by the row's name: predictions/NAME are its masks.

    In the order of ``params.rows`` where it is set; else one-step networks after the others, upper bounds last.
    """
    bounds = {name for name, block in params.segmentations.items() if block.labels == "ground_truth"}
    found = {name: f"segmentations/{name}" for name in params.segmentations if name not in bounds}
    found |= {name: f"one_step/{name}" for name in params.one_step}
    found |= {name: f"segmentations/{name}" for name in params.segmentations if name in bounds}
    return {name: found[name] for name in (*(params.rows or ()), *found) if name in found}


def label_rule(params: Params, labels: str) -> PseudoLabels | None:
    """The rule behind a segmentation's labels, or behind those that its mixture starts from; None: ground truth."""
    section, _, name = labels.partition("/")
    if section == "mixtures":
        return label_rule(params, params.mixtures[name].labels)
    return params.pseudo_labels[name] if section == "pseudo_labels" else None


def only(params: Params, kept: Sequence[str]) -> Params:
    """The params with these rows alone, and the blocks that they are derived from."""
    needs = sources(params)
    wanted: set[str] = set()
    queue = [network for name, network in rows(params).items() if name in kept]
    while queue:
        reference = queue.pop()
        if reference not in wanted:
            wanted.add(reference)
            queue.extend(needs.get(reference, ()))
    parts = {
        section: {name: block for name, block in getattr(params, section).items() if f"{section}/{name}" in wanted}
        for section in SECTIONS
    }
    return replace(params, **parts)  # type: ignore[arg-type]


def circle(params: Params) -> list[str]:
    """Blocks of which each refers to the next, and the last is the first again; empty where there are none."""
    ordered = set(in_order(params))
    waiting = {name: needs for name, needs in sources(params).items() if name not in ordered}
    seen: list[str] = []
    following = next(iter(waiting), None)
    while following is not None and following not in seen:
        seen.append(following)
        following = next(need for need in waiting[following] if need in waiting)
    return [*seen[seen.index(following) :], following] if following is not None else []


def lineage(params: Params, reference: str) -> list[str]:
    """All that maps come from along their first source: the classifier or one-step network first, the maps last."""
    needs = sources(params)
    chain = [reference]
    while found := needs.get(chain[0]):
        chain.insert(0, found[0])
    return chain
