"""Under which conditions the numbers were made: no score is worth reading without them."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from pipeline.config import references
from pipeline.config.schema import Params
from pipeline.data.index import Index
from pipeline.labels.crf import describe_crf
from pipeline.report import describe
from pipeline.report.describe import Logs


def facts(params: Params, index: Index, scored: Mapping[str, int]) -> list[tuple[str, str]]:
    """What holds for every row, as (term, words). ``scored``: images with masks by split."""
    splits = "; ".join(
        f"{split}: {len(index.splits[split])} images, {scored[split]} with masks" for split in ("train", "evaluation")
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
        ("Seed", str(params.seed)),
    ]


def map_columns(params: Params, reference: str, logs: Logs) -> dict[str, str]:
    """Heading and reference of each map store on the way to ``reference``.

    Before cumulative attention comes the localization of the same classifier, where it has one: not on the way, but
    what it is to be compared with.
    """
    chain = references.lineage(params, reference)
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
    """Whether the chain begins with what a classifier accumulated, not with the classifier itself."""
    return chain[0].startswith("classifiers/") and not (len(chain) > 1 and chain[1].startswith("localizations/"))


def _heading(params: Params, reference: str, logs: Logs) -> str:
    section, name = reference.split("/")
    if section != "localizations":
        return {"classifiers": "Cumulative attention", "walks": "Walked map"}[section]
    localization = params.localizations[name]
    return describe.network(logs, localization.model, "map_name") + (", climbed" if localization.climbing else "")


def provenance(params: Params, row: str, logs: Logs) -> dict[str, str]:
    """Where a row's numbers come from: maps, label rule, networks and their initial weights."""
    told = {"Maps": "none", "Map networks": "none", "Pseudo labels": "ground truth"}
    if row in params.one_step:
        labels, text = (describe.network(logs, f"one_step/{row}", key) for key in ("labels", "text"))
        return told | {"Pseudo labels": labels, "Segmentation network": text}
    network = params.segmentations[row]
    section, _, name = network.labels.partition("/")
    mixed = f"; masks of {100 * params.mixtures[name].share:g} % of the images" if section == "mixtures" else ""
    if rule := references.label_rule(params, network.labels):
        chain = references.lineage(params, rule.source)
        first = f"{chain[0]} (cumulative attention)" if _accumulated(chain) else chain[0]
        told["Maps"] = " → ".join([first, *chain[1:]])
        told["Map networks"] = "; ".join(dict.fromkeys(filter(None, (_step(params, name, logs) for name in chain))))
        told["Pseudo labels"] = describe.labels(rule) + mixed
    told["Segmentation network"] = describe.network(logs, f"segmentations/{row}")
    return told


def _step(params: Params, reference: str, logs: Logs) -> str:
    """What a block on the way to maps is or does; '' of a localization that only reads a network's maps."""
    section, name = reference.split("/")
    match section:
        case "localizations":
            return describe.climbing(params.localizations[name].climbing)
        case "walks":
            return describe.walk(params, params.walks[name], logs)
        case _:
            return describe.network(logs, reference)
