"""The sections of the report: which numbers and pictures, in which order, under which words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pipeline import references
from pipeline.contradictions import TRAINED
from pipeline.data.index import Image, Index
from pipeline.data.sample import choose
from pipeline.report import page, protocol, tables, words
from pipeline.report.charts import dot_chart, line_chart, thin
from pipeline.report.gallery import Layers, Step, gallery, holds, layer_gallery, legend
from pipeline.report.metrics import Chains, Metrics, Scores, supervision
from pipeline.report.published import PUBLISHED
from pipeline.schema import Classifier, Params
from pipeline.stores.raster import RasterStore

NUMBERS = (
    "Bold: the best row that learned from tags alone. Recall and noise (1 - precision): maps cut at half of their "
    "maximum, pixels pooled by class, mean over classes. mIoU*: at the background score that is best on these masks; "
    "swept on ground truth, so an upper bound for the maps and no result of a method. Pseudo labels: mIoU over "
    "labelled pixels; ignored: share of pixels without a label; mIoU+: with those counted as background. Rows in "
    "italics train on masks."
)
DEFINITIONS = (
    "mIoU: from one confusion matrix over all pixels of the split; mask pixels of 255 are excluded, predictions of 255 "
    "count as background, classes absent from both masks and predictions are left out of the mean. Masks serve only to "
    "evaluate, but for rows in italics. Versions and hashes are in the manifest beside each output."
)
MAPS = (
    "Maps: the strongest of the image's tags as heat; a line in the class's colour runs around half of each map's "
    "maximum, the region that recall and noise are taken from."
)
FEATURES = (
    "Train split. Features of each layer, averaged over their channels and normalised to [0, 1], each map by itself: "
    "dark is its least value, bright its greatest (DRS Fig. 5). The head's are those of its 3x3 convolutions. Where "
    "discriminative region suppression (DRS) is plugged in, what it leaves is shown."
)
NOT_MEASURED = (
    "Published, not measured here: mIoU in percent as the papers print it. It cannot be compared with the table above, "
    "whose rows have their own data, networks, saliency maps and lengths of training. A dash: none was found in the "
    "paper's text."
)
LAYERED = 4  # images whose layers are shown: every classifier is a row of each


@dataclass(frozen=True)
class Results:
    """All that the report shows. ``stores`` and ``scores`` are keyed by reference, ``logs`` and ``layers`` likewise."""

    params: Params
    index: Index
    rows: Chains
    metrics: Metrics
    scores: Scores
    logs: Mapping[str, Mapping[str, Any]]
    layers: Mapping[str, Sequence[str]]  # names, shallow to deep, by the reference of the features
    stores: Mapping[str, RasterStore]

    @property
    def names(self) -> list[str]:
        """Class names by class id."""
        return ["background", *self.index.classes]

    def masked(self, split: str) -> list[Image]:
        """The split's images that have a mask."""
        return [image for image in self.index.images(split) if holds(self.stores["ground_truth"], image)]


def document(results: Results) -> str:
    """The report as one HTML file."""
    params, index = results.params, results.index
    train, evaluation = (len(index.splits[split]) for split in ("train", "evaluation"))
    return page.page(
        f"{params.experiment}: weakly supervised segmentation",
        f"{train} training images with tags, {evaluation} evaluation images, {index.num_classes} classes.",
        {
            "Methods": methods(results),
            "Published figures on PASCAL VOC 2012": published(),
            "Protocol": conditions(results),
            "Classes": classes(results),
            "Curves": curves(results),
            "Confusion": confusion(results),
            "From tags to pseudo labels": train_gallery(results),
            "Feature maps": feature_gallery(results),
            "Predictions": evaluation_gallery(results),
        },
    )


def methods(results: Results) -> str:
    """Key figures, the table of methods, and how the rows fare from step to step."""
    rows, metrics, method = results.rows, results.metrics, results.params.method
    splits = {"maps": "train", "labels": "train", "predictions": "evaluation"}
    masked = {split: len(results.masked(split)) for split in set(splits.values())}
    spans = {
        step: f"{split}, {masked[split]} images" if masked[split] else "no masks" for step, split in splits.items()
    }
    parts = [page.figures(_key_figures(results)), "<p>All numbers are percent.</p>"]
    parts.append(tables.methods_table(metrics, rows, method, spans))
    parts.append(page.note(NUMBERS))
    labels = {"maps_best_threshold_miou": "maps*", "labels_miou": "pseudo labels", "miou": "segmentation"}
    dots = {row: {name: 100 * metrics[row][key] for key, name in labels.items() if key in metrics[row]} for row in rows}
    chart = dot_chart("mIoU from step to step", "mIoU (%)", dots, list(labels.values()))
    return "".join(parts) + (f'<div class="wide">{chart}</div>' if chart else "")


def published() -> str:
    """What the papers report, apart from all that was measured."""
    return f"<p>{escape(NOT_MEASURED)}</p>" + tables.published_table(PUBLISHED)


def _key_figures(results: Results) -> list[tuple[str, str]]:
    method, metrics = results.params.method, results.metrics
    figures = []
    if "miou" in metrics[method]:
        figures.append((f"{100 * metrics[method]['miou']:.1f} %", f"mIoU of {method}, the selected method"))
    for row, chain in results.rows.items():
        if supervision(chain) == "full" and row != method and "miou" in metrics[row]:
            figures.append(
                (f"{100 * metrics[row]['miou']:.1f} %", f"mIoU of {row}, the upper bound that learns from masks")
            )
    trivial = results.scores.get(results.rows[method]["predictions"], {}).get("all_background_miou")
    if trivial is not None:
        figures.append((f"{100 * trivial:.1f} %", "mIoU of predicting background everywhere"))
    return figures


def conditions(results: Results) -> str:
    """What every number was made with."""
    params = results.params
    scored = {split: len(results.masked(split)) for split in ("train", "evaluation")}
    return (
        page.facts(protocol.facts(params, results.index, scored))
        + tables.words_table({row: protocol.provenance(params, row) for row in results.rows}, "Method")
        + page.note(DEFINITIONS)
    )


def classes(results: Results) -> str:
    """IoU by class of every row, and recall by class of all maps."""
    rows = {row: results.scores.get(chain["predictions"], {}) for row, chain in results.rows.items()}
    iou = {row: {"": found["miou"], **found["iou"]} for row, found in rows.items() if "iou" in found}
    maps = {name: found for name, found in results.scores.items() if "recall" in found}
    recall = {name: {"": found["recall"], **found["recall_per_class"]} for name, found in maps.items()}
    parts = ""
    if iou:
        parts += "<h3>IoU of the predictions (%), evaluation split</h3>" + tables.heat_table(
            "Method", iou, "mIoU", results.names
        )
    if recall:
        parts += "<h3>Recall of maps cut at half of their maximum (%), train split</h3>"
        parts += tables.heat_table("Maps", recall, "mean", results.index.classes)
    return parts


def curves(results: Results) -> str:
    """Loss of every training, coverage by epoch, mIoU of maps by background threshold."""
    charts = []
    for section in TRAINED:
        losses = {
            name.split("/")[1]: thin([(entry["step"], entry["loss"]) for entry in log["steps"]])
            for name, log in results.logs.items()
            if name.startswith(f"{section}/")
        }
        charts.append(line_chart(f"Training loss of {section}", "optimizer step", "loss", losses))
    coverage = {}
    for name, found in results.scores.items():
        by_epoch = found.get("coverage_by_epoch") or {"epoch": []}
        if by_epoch["epoch"]:
            points = zip(by_epoch["epoch"], by_epoch["coverage"], strict=True)
            coverage[f"{name} ({by_epoch['images']} images)"] = [(x, 100 * y) for x, y in points if y is not None]
    charts.append(line_chart("Object pixels that cumulative attention discovered", "epoch", "coverage (%)", coverage))
    sweeps = {
        name: [(x, 100 * y) for x, y in zip(found["sweep"]["threshold"], found["sweep"]["miou"], strict=True)]
        for name, found in results.scores.items()
        if "sweep" in found
    }
    charts.append(line_chart("Maps against a constant background score", "background score", "mIoU (%)", sweeps))
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def confusion(results: Results) -> str:
    """Where the pixels of each class went, for the selected method."""
    method = results.params.method
    counts = results.scores.get(results.rows[method]["predictions"], {}).get("confusion")
    if not counts:
        return ""
    told = f"<p>Pixels of each class by what {escape(method)} predicted for them, in percent of the class's pixels.</p>"
    return told + tables.confusion_table(counts, results.names)


def train_gallery(results: Results) -> str:
    """Every step from a tagged training image to its pseudo label."""
    params, stores = results.params, results.stores
    method = _way(results)
    steps: list[Step] = []
    if method is not None:
        chain = results.rows[method]
        rule = references.label_rule(params, chain["labels"])
        if rule and rule.saliency:
            steps.append(Step("Saliency", params.saliency.kind, "saliency", stores["saliency"]))
        for heading, name in protocol.map_columns(params, chain["maps"]).items():
            if name.startswith("walks/"):
                walk = params.walks[name.split("/")[1]]
                learned = params.affinities[walk.affinity.split("/")[1]].labels
                steps.append(Step("Labels of the affinities", learned, "labels", stores[learned]))
            steps.append(Step(heading, name, "maps", stores[name]))
        steps.append(Step("Pseudo label", chain["labels"], "labels", stores[chain["labels"]]))
    told = f"<p>Train split, the way of {escape(method)}. {MAPS}</p>" if method else ""
    return told + _gallery(results, "train", steps)


def _way(results: Results) -> str | None:
    """The row whose maps are shown: the selected one, else one that learns from its answers, else the first."""
    method, rows = results.params.method, results.rows
    mapped = {row: references.lineage(results.params, chain["maps"]) for row, chain in rows.items() if "maps" in chain}
    if method in mapped:
        return method
    return next((row for row, way in mapped.items() if way[0] == f"one_step/{method}"), next(iter(mapped), None))


def feature_gallery(results: Results) -> str:
    """The layers of every classifier with suppression, and of plain CAM's that have the same (DRS Fig. 5)."""
    blocks, layers = results.params.classifiers, results.layers
    suppressed = [name for name, block in blocks.items() if block.suppression]
    kinds = [layers[f"features/{name}"] for name in suppressed]
    cams = [name for name, block in blocks.items() if block.method == "cam" and not block.attention_drop]
    plain = [name for name in cams if not blocks[name].suppression and layers[f"features/{name}"] in kinds]
    networks = [
        Layers(
            name,
            _remark(blocks[name]),
            layers[f"features/{name}"],
            results.stores[f"features/{name}"],
        )
        for name in [*plain, *suppressed]
    ]
    held = [image for image in results.index.images("train") if all(holds(row.store, image) for row in networks)]
    if not (suppressed and held):
        return ""
    return f"<p>{FEATURES}</p>" + layer_gallery(choose(held, LAYERED), networks, results.names)


def _remark(block: Classifier) -> str:
    method = "" if block.method == "cam" else f"{block.method.upper()}, "
    return method + words.suppression(block.suppression) if block.suppression else "plain"


def evaluation_gallery(results: Results) -> str:
    """The predictions of every row side by side."""
    steps = [
        Step(row, "upper bound" if supervision(chain) == "full" else "", "labels", results.stores[chain["predictions"]])
        for row, chain in results.rows.items()
    ]
    return "<p>Evaluation split, every row on the same images.</p>" + _gallery(results, "evaluation", steps)


def _gallery(results: Results, split: str, steps: Sequence[Step]) -> str:
    """``params.gallery`` images of the split, those with masks where there are any, beside their masks."""
    masked = results.masked(split)
    images = choose(masked or results.index.images(split), results.params.gallery)
    masks = results.stores["ground_truth"] if masked else None
    return legend(results.names) + gallery(images, steps, results.names, masks) if images else ""
