"""Which block is made of which: the references between the blocks of params.yaml."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.schema import Params, PseudoLabels

Needs = Mapping[str, tuple[str, ...]]  # SECTION/NAME -> what it is made of


def sources(params: Params) -> Needs:
    """Of every block between the classifiers and the labels that segmentation networks learn."""
    found: dict[str, tuple[str, ...]] = {}
    found |= {f"localizations/{name}": (block.model,) for name, block in params.localizations.items()}
    found |= {f"refinements/{name}": (block.source,) for name, block in params.refinements.items()}
    found |= {f"affinities/{name}": (block.labels,) for name, block in params.affinities.items()}
    found |= {f"walks/{name}": (block.maps, block.affinity) for name, block in params.walks.items()}
    found |= {f"pseudo_labels/{name}": (block.source,) for name, block in params.pseudo_labels.items()}
    return found


def in_order(params: Params) -> list[str]:
    """The blocks of ``sources``, each after all that it is made of. Those of a circle are left out."""
    waiting = dict(sources(params))
    ready: list[str] = []
    while now := [name for name, needs in waiting.items() if not any(need in waiting for need in needs)]:
        ready += now
        for name in now:
            del waiting[name]
    return ready


def rows(params: Params) -> dict[str, str]:
    """The network of each row of the report, SECTION/NAME by the row's name: predictions/NAME are its masks.

    In the order of ``params.rows`` where that is given; else one-step networks after the others, upper bounds last.
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
    """The params with these rows alone, and what they are made of."""
    needs = dict(sources(params))
    needs |= {f"mixtures/{name}": (block.labels,) for name, block in params.mixtures.items()}
    needs |= {f"segmentations/{name}": (block.labels,) for name, block in params.segmentations.items()}
    wanted: set[str] = set()
    queue = [network for name, network in rows(params).items() if name in kept]
    while queue:
        reference = queue.pop()
        if reference not in wanted:
            wanted.add(reference)
            queue.extend(needs.get(reference, ()))
    sections = {"classifiers", "one_step", *(reference.split("/")[0] for reference in needs)}
    parts = {
        section: {name: block for name, block in getattr(params, section).items() if f"{section}/{name}" in wanted}
        for section in sections
    }
    return replace(params, **parts)  # type: ignore[arg-type]


def circle(params: Params) -> list[str]:
    """Blocks of which each is made of the next and the last is the first again; empty where there are none."""
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
    while chain[0] in needs:
        chain.insert(0, needs[chain[0]][0])
    return chain
