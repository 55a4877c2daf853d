"""The sections of the report, in order, and the data of their templates."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import references
from pipeline.config.schema import Classifier, Params
from pipeline.config.stage_table import TRAINED
from pipeline.data.census import Census
from pipeline.data.index import Images, Index
from pipeline.data.sample import choose
from pipeline.data.voc import CLASSES as VOC_CLASSES
from pipeline.report import boxes, protocol, seeds, tables
from pipeline.report.boxes import BoxImages
from pipeline.report.charts import LineChart, dot_chart, line_chart, thin
from pipeline.report.describe import Logs
from pipeline.report.gallery import Gallery, Network, Step, gallery, holds, layer_gallery
from pipeline.report.metrics import Chains, Metrics, Scores, supervision
from pipeline.report.page import Section, page
from pipeline.report.photos import PhotoGallery
from pipeline.report.published import PUBLISHED
from pipeline.report.seeds import Runs
from pipeline.stores.raster import RasterStore

Content = dict[str, Any]  # variables of a section's template; empty if there is nothing to show
VOC_ID = re.compile(r"20(0[7-9]|1[0-2])_\d{6}")  # of the images of VOC 2012, such as 2007_000033
LAYER_IMAGES = 4  # images whose layers are shown, each with a row for every classifier


@dataclass(frozen=True)
class Results:
    """The input of the report. ``stores`` and ``layers``, of the first seed, are keyed by reference."""

    params: Params
    index: Index
    census: Census
    rows: Chains
    runs: Runs
    layers: Mapping[str, Sequence[str]]  # layer names, shallow to deep, of each feature store
    stores: Mapping[str, RasterStore]
    boxes: Mapping[str, BoxImages] = field(default_factory=dict)  # boxes.json of each block of boxes
    photos: PhotoGallery | None = None  # only if no stage creates the dataset

    @property
    def metrics(self) -> Metrics:
        """The mean of each score over the seeds, by row."""
        return seeds.means(self.runs)

    @property
    def scores(self) -> Scores:
        """The scores of the first seed, by reference."""
        return self.runs[self.params.seed].scores

    @property
    def logs(self) -> Logs:
        """The training logs of the first seed, by reference."""
        return self.runs[self.params.seed].logs

    @property
    def seeds(self) -> str:
        """All seeds as text; '' if there is only one."""
        return ", ".join(map(str, self.runs)) if len(self.runs) > 1 else ""

    @property
    def names(self) -> list[str]:
        """Class names by class id."""
        return ["background", *self.index.classes]

    @property
    def is_voc(self) -> bool:
        """Whether the dataset is PASCAL VOC 2012 or a part of it: its classes and evaluation images are VOC's."""
        ids = self.index.images("evaluation").ids
        return tuple(self.index.classes) == VOC_CLASSES and all(map(VOC_ID.fullmatch, ids))

    @property
    def is_benchmark(self) -> bool:
        """Whether the dataset is VOC, or generated, downloaded or converted, rather than the user's own photos."""
        return self.is_voc or bool(self.params.dataset.preparation_stages)

    def masked(self, split: str) -> Images:
        """The split's images that have a mask."""
        return self.index.images(split).having(lambda name: holds(self.stores["ground_truth"], name))

    @property
    def arithmetic(self) -> dict[str, str]:
        """The description of each row's arithmetic, over all seeds."""
        inferred = {seed: self._inference(seed) for seed in self.runs}
        found = {
            row: [protocol.arithmetic(self.params, row, run.logs, inferred[seed]) for seed, run in self.runs.items()]
            for row in self.rows
        }
        return {row: " / ".join(dict.fromkeys(kinds)) for row, kinds in found.items()}

    def _inference(self, seed: int) -> Mapping[str, Collection[str]]:
        """The arithmetic of the stores of a seed, by reference. That of further seeds is known from their scores."""
        if seed == self.params.seed:
            return {name: store.arithmetic for name, store in self.stores.items()}
        return {name: scores["arithmetic"] for name, scores in self.runs[seed].scores.items()}

    @property
    def is_mixed(self) -> bool:
        """Whether rows were computed in different arithmetic."""
        return len(set(self.arithmetic.values())) > 1


def document(results: Results) -> str:
    """Render the report as one HTML document.

    Own photos come first. Those of a benchmark come last, and published figures are shown for VOC only. Without rows,
    the report is on boxes alone.
    """
    index = results.index
    drawn = Section("Boxes", "boxes.html.j2", box_section(results))
    train, evaluation = (len(index.images(split)) for split in ("train", "evaluation"))
    own = results.photos
    photos = Section("Photos", "photos.html.j2", {"gallery": own} if own and own.photos else {})
    published = {"published": PUBLISHED} if results.is_voc else {}
    title = f"{results.params.experiment}: weakly supervised {'segmentation' if results.rows else 'localization'}"
    lead = f"{train} training images with tags, {evaluation} evaluation images, {index.num_classes} classes."
    if not results.rows:
        counted = Section("Dataset", "dataset.html.j2", dataset(results))
        return page(title, lead, [drawn, counted, Section("Curves", "curves.html.j2", curves(results))])
    return page(
        title,
        lead,
        [
            *(() if results.is_benchmark else (photos,)),
            Section("Methods", "methods.html.j2", methods(results)),
            Section("Seeds", "seeds.html.j2", orderings(results)),
            Section("Published figures on PASCAL VOC 2012", "published.html.j2", published),
            Section("Protocol", "protocol.html.j2", conditions(results)),
            Section("Dataset", "dataset.html.j2", dataset(results)),
            Section("Classes", "classes.html.j2", classes(results)),
            Section("Curves", "curves.html.j2", curves(results)),
            Section("Confusion", "confusion.html.j2", confusion(results)),
            Section("From tags to pseudo labels", "train.html.j2", train_gallery(results)),
            Section("Feature maps", "features.html.j2", feature_gallery(results)),
            Section("Predictions", "predictions.html.j2", evaluation_gallery(results)),
            drawn,
            *((photos,) if results.is_benchmark else ()),
        ],
    )


def box_section(results: Results) -> Content:
    """The localization accuracy of all boxes over the seeds, and a gallery of true and drawn ones of the first seed."""
    scores = boxes.scored(results.scores)
    if not scores:
        return {}
    is_cub = results.params.dataset.cub is not None
    images = results.index.images("evaluation").having(
        lambda name: all(name in each for each in results.boxes.values())
    )
    chosen = choose(images, results.params.gallery)
    return {
        "table": boxes.table(results.runs) | (boxes.published() if is_cub else {}),
        "is_cub": is_cub,
        "seeds": results.seeds,
        "first": results.params.seed,
        "truth": next(iter(scores.values()))["truth"],
        "threshold": next(iter(scores.values()))["threshold"],
        "gallery": boxes.gallery(chosen, results.boxes, results.names) if chosen else None,
    }


def methods(results: Results) -> Content:
    """Key figures, the table of methods, and a chart of each row's mIoU at every step."""
    rows, metrics, method = results.rows, results.metrics, results.params.method
    splits = {"maps": "train", "labels": "train", "predictions": "evaluation"}
    masked = {split: len(results.masked(split)) for split in set(splits.values())}
    scored_on = {
        step: f"{split}, {masked[split]} images" if masked[split] else "no masks" for step, split in splits.items()
    }
    labels = {"maps_best_threshold_miou": "maps*", "labels_miou": "pseudo labels", "miou": "segmentation"}
    dots = {row: {name: 100 * metrics[row][key] for key, name in labels.items() if key in metrics[row]} for row in rows}
    bars = {
        row: {labels[key]: (100 * least, 100 * most) for key, (least, most) in spread.items() if key in labels}
        for row, spread in seeds.ranges(results.runs).items()
    }
    return {
        "figures": _key_figures(results),
        "table": tables.methods_table(results.runs, rows, method, scored_on),
        "seeds": results.seeds,
        "is_mixed": results.is_mixed,
        "warnings": {
            f"{name} (seed {seed})" if results.seeds else name: log["warning"]
            for seed, run in results.runs.items()
            for name, log in run.logs.items()
            if "warning" in log
        },
        "chart": dot_chart("mIoU from step to step", "mIoU (%)", dots, list(labels.values()), bars),
    }


def orderings(results: Results) -> Content:
    """The rankings of the rows over several seeds."""
    drawn = seeds.rankings(results.rows, results.runs)
    about = {"seeds": results.seeds, "count": len(results.runs), "first": results.params.seed}
    return {"rankings": drawn, **about} if drawn else {}


def _key_figures(results: Results) -> list[tuple[str, str]]:
    """The most important figures, as (number, description)."""
    method, metrics, ranges = results.params.method, results.metrics, seeds.ranges(results.runs)

    def spread(row: str) -> str:
        return f" ({ranges[row]['miou']} over {len(results.runs)} seeds)" if row in ranges else ""

    figures = []
    if "miou" in metrics[method]:
        figures.append((metrics[method]["miou"], f"mIoU of {method}, the selected method{spread(method)}"))
    for row, chain in results.rows.items():
        if supervision(chain) == "full" and row != method and "miou" in metrics[row]:
            bound = f"mIoU of {row}, the upper bound that learns from masks{spread(row)}"
            figures.append((metrics[row]["miou"], bound))
    trivial = results.scores.get(results.rows[method]["predictions"], {}).get("all_background_miou")
    if trivial is not None:
        figures.append((trivial, "mIoU of predicting background everywhere"))
    return [(f"{100 * share:.1f} %", description) for share, description in figures]


def conditions(results: Results) -> Content:
    """The conditions under which the scores were measured."""
    params = results.params
    scored = {split: len(results.masked(split)) for split in ("train", "evaluation")}
    facts = protocol.facts(params, results.index, scored)
    rows = {row: protocol.provenance(params, row, results.logs) for row in results.rows}
    if results.is_mixed:
        rows = {row: {**sources, "Computed in": results.arithmetic[row]} for row, sources in rows.items()}
    else:
        facts.append(("Computed in", next(iter(results.arithmetic.values()))))
    return {"facts": facts, "rows": rows}


def dataset(results: Results) -> Content:
    """The census: images by class and split, tags compared with masks, and remarks."""
    census = results.census
    return {"facts": census.facts(), "table": tables.census_table(census), "remarks": census.remarks}


def classes(results: Results) -> Content:
    """Per-class IoU of every row, and per-class recall of all maps; the classes that nothing can learn."""
    rows = {row: results.scores.get(chain["predictions"], {}) for row, chain in results.rows.items()}
    iou = {row: {"": scores["miou"], **scores["iou"]} for row, scores in rows.items() if "iou" in scores}
    maps = {name: scores for name, scores in results.scores.items() if "recall" in scores}
    recall = {name: {"": scores["recall"], **scores["recall_per_class"]} for name, scores in maps.items()}
    content: Content = {}
    if iou:
        content["iou"] = tables.heat_table("Method", iou, "mIoU", results.names)
        content["untaught"] = _untaught(results, iou)
    if recall:
        content["recall"] = tables.heat_table("Maps", recall, "mean", results.index.classes)
    return content


def _untaught(results: Results, iou: Mapping[str, Mapping[str, float | None]]) -> str:
    """Describe the classes without a training image whose IoU lowers the mean; '' if there are none."""
    weak = [row for row in iou if supervision(results.rows[row]) != "full"]
    counted = [name for name in results.census.untaught if any(iou[row].get(name) is not None for row in weak)]
    if not counted:
        return ""
    method = results.params.method if results.params.method in weak else weak[0]
    values = {name: value for name, value in iou[method].items() if name and value is not None}
    rest = [value for name, value in values.items() if name not in counted]
    mean = sum(rest) / len(rest) if rest else 0.0
    return (
        f"No training image is tagged with {', '.join(counted)}. A network that learns from tags cannot learn such a "
        f"class, and its IoU of 0 lowers the mean: without it, the mIoU of {method} is {100 * mean:.1f} "
        f"instead of {100 * (iou[method][''] or 0.0):.1f}."
    )


def curves(results: Results) -> Content:
    """Charts of the training losses, coverage by epoch, and mIoU of maps by background score."""
    charts: list[LineChart | None] = []
    for section in TRAINED:
        losses = {
            name.split("/")[1]: thin([(entry["step"], entry["loss"]) for entry in log["steps"]])
            for name, log in results.logs.items()
            if name.startswith(f"{section}/")
        }
        charts.append(line_chart(f"Training loss of {section}", "optimizer step", "loss", losses))
    coverage = {}
    for name, scores in results.scores.items():
        by_epoch = scores.get("coverage_by_epoch") or {"epoch": []}
        if by_epoch["epoch"]:
            points = zip(by_epoch["epoch"], by_epoch["coverage"], strict=True)
            coverage[f"{name} ({by_epoch['images']} images)"] = [(x, 100 * y) for x, y in points if y is not None]
    title = "Share of object pixels that cumulative attention has discovered"
    charts.append(line_chart(title, "epoch", "coverage (%)", coverage))
    sweeps = {
        name: [(x, 100 * y) for x, y in zip(scores["sweep"]["threshold"], scores["sweep"]["miou"], strict=True)]
        for name, scores in results.scores.items()
        if "sweep" in scores
    }
    title = "mIoU of the maps by constant background score"
    charts.append(line_chart(title, "background score", "mIoU (%)", sweeps, highest=True))
    drawn = [chart for chart in charts if chart]
    return {"charts": drawn} if drawn else {}


def confusion(results: Results) -> Content:
    """The confusion matrix of the selected method."""
    method = results.params.method
    counts = results.scores.get(results.rows[method]["predictions"], {}).get("confusion")
    return {"method": method, "table": tables.confusion_table(counts, results.names)} if counts else {}


def train_gallery(results: Results) -> Content:
    """A gallery of all steps from tagged training images to pseudo labels."""
    params, stores = results.params, results.stores
    row = _row_with_maps(results)
    steps: list[Step] = []
    if row is not None:
        chain = results.rows[row]
        labels = references.label_rule(params, chain["labels"])
        if labels and labels.rule.settings.needs_saliency:
            steps.append(Step("Saliency", params.saliency.kind, "saliency", stores["saliency"]))
        for heading, name in protocol.map_columns(params, chain["maps"], results.logs).items():
            if name.startswith("walks/"):
                walk = params.walks[name.split("/")[1]]
                learned = params.affinities[walk.affinity.split("/")[1]].labels
                steps.append(Step("Labels of the affinities", learned, "labels", stores[learned]))
            steps.append(Step(heading, name, "maps", stores[name]))
        steps.append(Step("Pseudo label", chain["labels"], "labels", stores[chain["labels"]]))
    drawn = _gallery(results, "train", steps)
    return {"row": row, "gallery": drawn} if drawn else {}


def _row_with_maps(results: Results) -> str | None:
    """Row shown in the gallery: the selected row if it has maps, else a row trained on its output, else the first."""
    method, rows = results.params.method, results.rows
    chains = {
        row: references.ancestors(results.params, chain["maps"]) for row, chain in rows.items() if "maps" in chain
    }
    if method in chains:
        return method
    return next((row for row, chain in chains.items() if chain[0] == f"one_step/{method}"), next(iter(chains), None))


def feature_gallery(results: Results) -> Content:
    """A gallery of the layers of classifiers with suppression and comparable plain ones (DRS Fig. 5).

    A plain classifier is comparable if its method and layers are those of a classifier with suppression.
    """
    blocks, layers = results.params.classifiers, results.layers
    kinds = {name: (block.method.name, tuple(layers[f"features/{name}"])) for name, block in blocks.items()}
    suppressed = [name for name, block in blocks.items() if block.suppression]
    compared = {kinds[name] for name in suppressed}
    plain = [name for name, block in blocks.items() if not (block.suppression or block.attention_drop)]
    plain = [name for name in plain if kinds[name] in compared]
    several = len({method for method, _ in compared}) > 1
    networks = [
        Network(name, _remark(blocks[name], several), layers[f"features/{name}"], results.stores[f"features/{name}"])
        for name in [*plain, *suppressed]
    ]
    images = results.index.images("train")
    complete = images.having(lambda name: all(holds(row.store, name) for row in networks))
    if not (suppressed and complete):
        return {}
    return {"gallery": layer_gallery(choose(complete, LAYER_IMAGES), networks, results.names)}


def _remark(block: Classifier, several: bool) -> str:
    """Describe the suppression, preceded by the method if ``several`` methods are compared."""
    method = f"{block.method.name.upper()}, " if several else ""
    return method + (block.suppression.describe() if block.suppression else "plain")


def evaluation_gallery(results: Results) -> Content:
    """A gallery of the predictions of all rows."""
    steps = [
        Step(row, "upper bound" if supervision(chain) == "full" else "", "labels", results.stores[chain["predictions"]])
        for row, chain in results.rows.items()
    ]
    drawn = _gallery(results, "evaluation", steps)
    return {"gallery": drawn} if drawn else {}


def _gallery(results: Results, split: str, steps: Sequence[Step]) -> Gallery | None:
    """A gallery of ``params.gallery`` images of the split; images with masks are preferred and shown with them."""
    masked = results.masked(split)
    images = choose(masked or results.index.images(split), results.params.gallery)
    masks = results.stores["ground_truth"] if masked else None
    return gallery(images, steps, results.names, masks) if images else None
