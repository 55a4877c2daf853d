"""Under which conditions the numbers were made: no score is worth reading without them."""

from collections.abc import Mapping
from pathlib import Path

from pipeline import references
from pipeline.data.index import Index
from pipeline.schema import Backbone, Crf, Params, Suppression


def facts(params: Params, index: Index, scored: Mapping[str, int]) -> list[tuple[str, str]]:
    """What holds for every row, as (term, words). ``scored``: images with masks by split."""
    splits = "; ".join(
        f"{split}: {len(index.splits[split])} images, {scored[split]} with masks" for split in ("train", "evaluation")
    )
    saliency = params.saliency
    scales = ", ".join(f"{scale:g}" for scale in params.test.scales)
    return [
        ("Dataset", f"{Path(params.dataset.root).name}, {index.num_classes} classes and background"),
        ("Splits", splits),
        ("Image-level labels", index.tag_source),
        ("Saliency", saliency.kind + (f" {saliency.path}" if saliency.path else "")),
        ("Test", f"scales {scales}; flip {'on' if params.test.flip else 'off'}; dense CRF {_crf(params.test.crf)}"),
        ("Seed", str(params.seed)),
    ]


def map_columns(params: Params, reference: str) -> dict[str, str]:
    """Heading and reference of each map store on the way to ``reference``; plain CAM first where it was made.

    A one-step network's maps are its classes' probabilities.
    """
    chain = references.lineage(params, reference)
    if chain[0].startswith("one_step/"):
        found = [name for name in chain if name.startswith(("localizations/", "walks/"))]
        return {"Probability" if number == 0 else f"Refined map {number}": name for number, name in enumerate(found)}
    plain = [f"localizations/{name}" for name, block in params.localizations.items() if block.model == chain[0]]
    columns = {"CAM": next((name for name in plain if name in chain), plain[0])} if plain else {}
    columns["Cumulative attention"] = chain[0]
    refined = [name for name in chain if name.startswith(("localizations/", "walks/")) and name not in plain]
    for number, name in enumerate(refined):
        columns["Refined map" if len(refined) == 1 else f"Refined map {number + 1}"] = name
    return columns


def provenance(params: Params, row: str) -> dict[str, str]:
    """Where a row's numbers come from: maps, label rule, networks and their initial weights."""
    if row in params.one_step:
        trained = _trained(params, f"one_step/{row}")
        return {"Maps": "none", "Map networks": "none", "Pseudo labels": "on the fly", "Segmentation network": trained}
    network = params.segmentations[row]
    labels, words = network.labels, ""
    if labels.startswith("mixtures/"):
        mixture = params.mixtures[labels.split("/")[1]]
        labels, words = mixture.labels, f"; masks of {100 * mixture.share:g} % of the images"
    told = {"Maps": "none", "Map networks": "none", "Pseudo labels": "ground truth"}
    if labels.startswith("pseudo_labels/"):
        rule = params.pseudo_labels[labels.split("/")[1]]
        chain = references.lineage(params, rule.source)
        told["Maps"] = " → ".join(chain)
        told["Map networks"] = "; ".join(dict.fromkeys(_trained(params, name) for name in _networks(chain)))
        background = "saliency" if rule.saliency else f"constant background {rule.background:g}"
        if rule.background_power is not None:
            background = f"background (1 - strongest)^{rule.background_power:g}"
        told["Pseudo labels"] = f"rule {rule.rule}, {background}, dense CRF {_crf(rule.crf)}{words}"
    told["Segmentation network"] = f"{network.network}, {_backbone(network.backbone)}"
    return told


def _networks(chain: list[str]) -> list[str]:
    return [name for name in chain if name.startswith(("classifiers/", "refinements/", "one_step/"))]


def _trained(params: Params, reference: str) -> str:
    section, name = reference.split("/")
    if section == "one_step":
        learner = params.one_step[name]
        return f"AGEN, {_backbone(learner.classification)}, {_backbone(learner.segmentation)}"
    if section == "refinements":
        refinement = params.refinements[name]
        return f"{refinement.kind} {_backbone(refinement.backbone)}"
    classifier = params.classifiers[name]
    parts = [_backbone(classifier.backbone)]
    if classifier.suppression is not None:
        parts.append(suppression(classifier.suppression))
    if classifier.attention_drop is not None:
        parts.append("attention drop layer")
    return ", ".join(parts)


def suppression(settings: Suppression) -> str:
    """As 'DRS, delta 0.55, in conv6, head'."""
    kind = f"DRS, delta {settings.delta:g}" if settings.delta else "DRS, learnable"
    return kind if settings.layers is None else f"{kind}, in {', '.join(settings.layers) or 'no layer'}"


def _backbone(backbone: Backbone) -> str:
    weights = backbone.weights
    start = "random" if weights is None else "ImageNet" if weights == "imagenet" else Path(weights).name
    return f"{backbone.name} from {start} weights"


def _crf(crf: Crf | None) -> str:
    return "off" if crf is None else f"on ({crf.iterations} iterations)"
