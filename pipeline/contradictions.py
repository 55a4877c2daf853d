"""What no single key of params.yaml can tell: references that lead nowhere, and values that contradict each other."""

from collections.abc import Iterator

from pipeline import references
from pipeline.errors import PipelineError
from pipeline.registry import Choice
from pipeline.schema import Params

SECTIONS = (  # of blocks that ``defaults`` can complete
    "classifiers",
    "refinements",
    "localizations",
    "affinities",
    "walks",
    "pseudo_labels",
    "segmentations",
    "one_step",
)
TRAINED = ("classifiers", "refinements", "affinities", "segmentations", "one_step")


def contradictions(params: Params) -> Iterator[str]:
    """A line for each, which begins with the key that is at fault."""
    yield from _dangling(params)
    for name, labels in params.pseudo_labels.items():
        yield from _rule_faults(f"pseudo_labels.{name}.rule", labels.rule, params.saliency.kind != "none")
    for name in params.one_step:
        if name in params.segmentations:
            yield f"one_step.{name}: segmentations has the same name, and both would be predictions/{name}"
    rows = references.rows(params)
    yield from (f"rows: {row} is none of {', '.join(rows)}" for row in params.rows or () if row not in rows)
    if params.method not in (chosen := rows if params.rows is None else params.rows):
        yield f"method: {params.method} is none of the rows {', '.join(chosen)}"
    if circle := references.circle(params):
        yield f"goes round in a circle: {' <- '.join(circle)}"


def _dangling(params: Params) -> Iterator[str]:
    """References to blocks that are not there, or not of a kind that is wanted there."""
    known = {section: {f"{section}/{name}" for name in getattr(params, section)} for section in (*SECTIONS, "mixtures")}
    maps = known["classifiers"] | known["localizations"] | known["walks"]
    wanted: dict[tuple[str, str], set[str]] = {
        ("localizations", "model"): known["classifiers"] | known["refinements"] | known["one_step"],
        ("refinements", "source"): maps,
        ("affinities", "labels"): known["pseudo_labels"],
        ("walks", "affinity"): known["affinities"],
        ("walks", "maps"): maps,
        ("pseudo_labels", "source"): maps,
        ("mixtures", "labels"): known["pseudo_labels"],
        ("segmentations", "labels"): known["pseudo_labels"] | known["mixtures"] | {"ground_truth"},
    }
    for (section, key), choices in wanted.items():
        for name, block in getattr(params, section).items():
            if (reference := getattr(block, key)) not in choices:
                yield f"{section}.{name}.{key}: refers to {reference}, which is none of {', '.join(sorted(choices))}"


def _rule_faults(where: str, rule: Choice, saliency: bool) -> Iterator[str]:
    """Of a label rule, whose settings are read here: that imports no torch."""
    try:
        settings = rule.settings
    except PipelineError as error:
        yield from error.lines
        return
    if settings.needs_saliency and not saliency:
        yield (
            f"{where}: {rule.name} reads saliency maps, but saliency.kind is none; choose saliency maps, or a rule or "
            "settings without them"
        )
