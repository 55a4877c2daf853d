"""Cross-field validation of params.yaml: dangling references and inconsistent settings."""

from collections.abc import Iterator

from pipeline.config import references
from pipeline.config.schema import Params


def contradictions(params: Params) -> Iterator[str]:
    """Yield a line for each inconsistency between blocks. A line starts with the key at fault."""
    yield from references.dangling(params)
    for name in params.one_step:
        if name in params.segmentations:
            yield f"one_step.{name}: segmentations has the same name, and both would be predictions/{name}"
    rows = references.rows(params)
    yield from (f"rows: {row} is none of {', '.join(rows)}" for row in params.rows or () if row not in rows)
    yield from (f"first: {row} is none of {', '.join(rows)}" for row in params.first if row not in rows)
    if params.method not in (chosen := rows if params.rows is None else params.rows):
        yield f"method: {params.method} is none of the rows {', '.join(chosen)}"
    if cycle := references.cycle(params):
        yield f"references form a cycle: {' <- '.join(cycle)}"


def lacking_saliency(params: Params) -> Iterator[str]:
    """Yield a line for each label rule that needs saliency maps if there are none. This imports the rules."""
    for name, labels in params.pseudo_labels.items():
        if labels.rule.settings.needs_saliency and params.saliency.kind == "none":
            yield (
                f"pseudo_labels.{name}.rule: {labels.rule.name} reads saliency maps, but saliency.kind is none; choose "
                "saliency maps, or a rule or settings without them"
            )
