"""Cross-field validation of params.yaml: dangling references, inconsistent settings, rows that lack their inputs."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

from pipeline.config import references, table_rows
from pipeline.config.schema import Params
from pipeline.errors import PipelineError


def contradictions(params: Params) -> Iterator[str]:
    """Yield a line for each inconsistency between blocks. A line starts with the key at fault."""
    yield from references.dangling(params)
    yield from _seed_faults(params)
    for name in params.one_step:
        if name in params.segmentations:
            yield f"one_step.{name}: segmentations has the same name, and both would be predictions/{name}"
    yield from _row_faults(params)
    if cycle := references.cycle(params):
        yield f"references form a cycle: {' <- '.join(cycle)}"


def _seed_faults(params: Params) -> Iterator[str]:
    """Yield the faults of ``seeds`` as a whole."""
    if params.seeds is None:
        return
    if not params.seeds:
        yield f"seeds: is empty; list seeds, such as [{params.seed}, {params.seed + 1}], or leave it out"
    elif params.seed not in params.seeds:
        yield f"seeds: must contain seed, {params.seed}, whose results lie in results/{params.experiment}; add it"
    for seed in sorted({seed for seed in params.seeds if params.seeds.count(seed) > 1}):
        yield f"seeds: {seed} is listed more than once; each seed is run once"


def _row_faults(params: Params) -> Iterator[str]:
    """Yield the faults of ``rows``, ``first`` and ``method``, or of the tables that replace them."""
    if params.tables:
        yield from table_rows.faults(params)
        if not params.rows:
            yield "rows: none of them is a row of the tables; name one of theirs, or set rows to null"
        return
    rows = references.rows(params)
    yield from (f"rows: {row} is none of {', '.join(rows)}" for row in params.rows or () if row not in rows)
    yield from (f"first: {row} is none of {', '.join(rows)}" for row in params.first if row not in rows)
    chosen = rows if params.rows is None else params.rows
    if not chosen and not params.boxes:
        yield "rows: there is none, and no boxes either; add a row or a block of boxes"
    elif chosen and params.method not in chosen:
        yield f"method: {params.method} is none of the rows {', '.join(chosen)}"


MASKS, SALIENCY = "masks, but dataset.masks is null", "saliency maps, but saliency.kind is none"
FIXES = {
    MASKS: "set dataset.masks to the folder of masks",
    SALIENCY: "set saliency.kind to folder or store, or to a detector",
}


def lacking_inputs(params: Params) -> dict[str, str]:
    """Map each block that needs masks or saliency maps that the params do not name to the reason, a key of ``FIXES``.

    This imports the label rules if there are no saliency maps. A rule with faulty settings is not judged.
    """
    lacking: dict[str, str] = {}
    if params.dataset.masks is None:
        lacking |= dict.fromkeys(["ground_truth", *(f"mixtures/{name}" for name in params.mixtures)], MASKS)
    if params.saliency.kind == "none":
        for name, labels in params.pseudo_labels.items():
            with suppress(PipelineError):
                if labels.rule.settings.needs_saliency:
                    lacking[f"pseudo_labels/{name}"] = SALIENCY
    return lacking


def reason_left_out(params: Params, reference: str) -> str:
    """Return why no row that runs needs a block, and the fix.

    Args:
        params: with the blocks of all rows.
        reference: the block, SECTION/NAME.
    """
    chains = {row: references.derived_from(params, [network]) for row, network in references.rows(params).items()}
    rows = [row for row, chain in chains.items() if reference in chain]
    if not rows:
        return "no row needs it; refer to it in the block of a row"
    chosen = rows if params.rows is None else [row for row in rows if row in params.rows]
    shown = chosen or rows
    one = len(shown) == 1
    lacking = lacking_inputs(params)
    reasons = sorted({lacking[block] for row in shown for block in chains[row] & lacking.keys()})
    causes, fixes = [f"{'needs' if one else 'need'} {reason}" for reason in reasons], [FIXES[key] for key in reasons]
    if not chosen:
        causes.insert(0, f"{'is' if one else 'are'} not listed in rows")
        fixes.insert(0, f"add {'it' if one else 'one'} there")
    return f"{'row' if one else 'rows'} {', '.join(shown)} {' and '.join(causes)}; {' and '.join(fixes)}"


def possible_rows(params: Params, origin: str, notice: Callable[[str], None]) -> Params:
    """Leave out the rows that need masks or saliency maps that are not there, and say so once.

    Args:
        origin: the source of the params, with which errors start.

    Raises:
        PipelineError: no row is left.
    """
    lacking = lacking_inputs(params)
    rows = references.rows(params)
    needs = {row: references.derived_from(params, [network]) & lacking.keys() for row, network in rows.items()}
    kept = tuple(row for row in rows if not needs[row])
    if len(kept) == len(rows) and not lacking.keys() - {"ground_truth"}:
        return params
    by_reason: dict[str, list[str]] = {}
    for row, blocks in needs.items():
        for reason in sorted({lacking[block] for block in blocks}):
            by_reason.setdefault(reason, []).append(row)
    end = "to run them, {}" if kept else "no row is left: {}, or choose other rows"
    lines = [
        f"rows left out, since they need {reason}: {', '.join(names)}; {end.format(FIXES[reason])}"
        for reason, names in by_reason.items()
    ]
    if not kept:
        raise PipelineError(*(f"{origin}: {line}" for line in lines))
    method = params.method if params.method in kept else kept[0]
    if method != params.method:
        lines.append(f"metrics.json holds the scores of {method}, since {params.method} is left out")
    for line in lines:
        notice(line)
    return references.keep_rows(replace(params, method=method), kept)
