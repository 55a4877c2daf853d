"""Conditions under which the scores were measured, without which they cannot be interpreted."""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from pipeline.config import references
from pipeline.config.schema import Params
from pipeline.data.index import Index
from pipeline.labels.crf import describe_crf
from pipeline.report import describe
from pipeline.report.describe import Logs


def facts(params: Params, index: Index, scored: Mapping[str, int]) -> list[tuple[str, str]]:
    """Conditions common to all rows, as (term, description). ``scored``: number of images with masks by split."""
    splits = "; ".join(
        f"{split}: {len(index.images(split))} images, {scored[split]} with masks" for split in ("train", "evaluation")
    )
    saliency = params.saliency
    test = params.test
    scales = ", ".join(f"{scale:g}" for scale in test.scales)
    return [
        ("Dataset", f"{Path(params.dataset.root).name}, {index.num_classes} classes and background"),
        ("Splits", splits),
        ("Image-level labels", index.tag_source),
        ("Saliency", saliency.kind + (f" {saliency.path}" if saliency.path else "")),
        ("Test", f"scales {scales}; flip {'on' if test.flip else 'off'}; dense CRF {describe_crf(test.crf)}"),
        ("Seeds" if params.further_seeds else "Seed", ", ".join(map(str, params.every_seed))),
    ]


def arithmetic(params: Params, row: str, logs: Logs, inference: Mapping[str, Collection[str]]) -> str:
    """Describe the arithmetic of a row's trainings, and that of the inference between and after them if it differs.

    ``inference`` holds the arithmetic of stores, by reference.
    """
    used = references.derived_from(params, [references.rows(params)[row]])
    trained = {kind for name in used if name in logs for kind in logs[name]["arithmetic"]}
    outputs = {name for name in (*used, f"predictions/{row}") if name in inference and name not in logs}
    inferred = {kind for name in outputs for kind in inference[name]}
    training, other = ("; ".join(sorted(kinds)) or "not recorded" for kinds in (trained, inferred))
    return training if other == training else f"training: {training}. Inference: {other}"


def map_columns(params: Params, reference: str, logs: Logs) -> dict[str, str]:
    """References of the map stores that lead to ``reference``, by heading, in order.

    Cumulative attention is preceded by the localization of the same classifier, if there is one. It is not a source of
    the maps and is shown for comparison.
    """
    chain = references.ancestors(params, reference)
    names = [name for name in chain if name.startswith(("localizations/", "walks/"))]
    if _accumulated(chain):
        plain = [f"localizations/{name}" for name, block in params.localizations.items() if block.model == chain[0]]
        names = [*plain[:1], chain[0], *names]
    headings = [_heading(params, name, logs) for name in names]
    counts, numbers = Counter(headings), Counter[str]()
    columns = {}
    for heading, name in zip(headings, names, strict=True):
        numbers[heading] += 1
        columns[heading if counts[heading] == 1 else f"{heading} {numbers[heading]}"] = name
    return columns


def _accumulated(chain: list[str]) -> bool:
    """Whether the chain starts with a classifier's cumulative attention, not with its localization."""
    return chain[0].startswith("classifiers/") and not (len(chain) > 1 and chain[1].startswith("localizations/"))


def _heading(params: Params, reference: str, logs: Logs) -> str:
    section, name = reference.split("/")
    if section != "localizations":
        return {"classifiers": "Cumulative attention", "walks": "Walked map"}[section]
    localization = params.localizations[name]
    return describe.network(logs, localization.model, "map_name") + (", climbed" if localization.climbing else "")


def provenance(params: Params, row: str, logs: Logs) -> dict[str, str]:
    """Describe how a row was obtained: maps, label rule, networks and their initial weights."""
    sources = {"Maps": "none", "Map networks": "none", "Pseudo labels": "ground truth"}
    if row in params.one_step:
        labels, text = (describe.network(logs, f"one_step/{row}", key) for key in ("labels", "text"))
        return sources | {"Pseudo labels": labels, "Segmentation network": text}
    network = params.segmentations[row]
    section, _, name = network.labels.partition("/")
    mixed = f"; masks of {100 * params.mixtures[name].share:g} % of the images" if section == "mixtures" else ""
    if rule := references.label_rule(params, network.labels):
        chain = references.ancestors(params, rule.source)
        first = f"{chain[0]} (cumulative attention)" if _accumulated(chain) else chain[0]
        sources["Maps"] = " → ".join([first, *chain[1:]])
        sources["Map networks"] = "; ".join(dict.fromkeys(filter(None, (_step(params, name, logs) for name in chain))))
        sources["Pseudo labels"] = describe.labels(rule) + mixed
    sources["Segmentation network"] = describe.network(logs, f"segmentations/{row}")
    return sources


def _step(params: Params, reference: str, logs: Logs) -> str:
    """Describe a block that contributes to maps; '' for a localization without climbing."""
    section, name = reference.split("/")
    match section:
        case "localizations":
            return describe.climbing(params.localizations[name].climbing)
        case "walks":
            return describe.walk(params, params.walks[name], logs)
        case _:
            return describe.network(logs, reference)
