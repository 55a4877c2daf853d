"""A small experiment whose rasters are drawn, not learned; its evaluation and report are computed by their stages."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipeline import arithmetic
from pipeline.config import params as parameters
from pipeline.data import census
from pipeline.data.duplicates import fingerprint
from pipeline.data.faults import Faults
from pipeline.data.index import write
from pipeline.data.parts import parts
from pipeline.runtime import Runtime
from pipeline.stores.raster import RasterWriter
from pipeline.training import models
from pipeline.workflow.graph import Graph, Job
from pipeline.workflow.stage import Work
from stages import evaluation, report
from stages.affinity import AffinityTask
from stages.segmentation import SegmentationTask

SIDE = 48
NAMES = ["circle", "square", "cross"]
SMALL = {"backbone": {"name": "small"}, "training": {"batch_size": 2, "lr": 0.1, "epochs": 3}}
LEARNER = {**SMALL, "network": "deeplab_largefov"}
RAW: dict[str, Any] = {
    "experiment": "drawn",
    "seed": 3,
    "method": "oaa_plus",
    "dataset": {
        "root": "data/drawn",
        "classes": "classes.txt",
        "masks": "SegmentationClass",
        "demo": {"train": 8, "evaluation": 5, "size": SIDE},
    },
    "saliency": {"kind": "folder", "path": "data/drawn/Saliency"},
    "classifiers": {"base": SMALL},
    "refinements": {"oaa_plus": {"source": "classifiers/base", **SMALL}},
    "localizations": {"cam": {"model": "classifiers/base"}, "refined": {"model": "refinements/oaa_plus"}},
    "pseudo_labels": {
        "cam": {"source": "localizations/cam", "rule": "oaa"},
        "oaa": {"source": "classifiers/base", "rule": {"oaa": {"crf": {"iterations": 4}}}},
        "oaa_plus": {"source": "localizations/refined", "rule": "oaa"},
    },
    "mixtures": {"tenth": {"labels": "pseudo_labels/oaa", "share": 0.1}},
    "segmentations": {
        "cam": {"labels": "pseudo_labels/cam", **LEARNER},
        "oaa": {"labels": "pseudo_labels/oaa", **LEARNER},
        "oaa_plus": {"labels": "pseudo_labels/oaa_plus", **LEARNER},
        "mixed": {"labels": "mixtures/tenth", **LEARNER},
        "supervised": {"labels": "ground_truth", **LEARNER},
    },
    "gallery": 4,
}
LAYERS = {"": ["conv2", "conv4", "head"], "wide": ["b2", "b3"]}  # by the classifier's name; '' of all others
KIND = "fp32 on CPU (AVX2), 1 thread"  # of all trainings and inference
OTHER = "bf16 on CPU (AVX512_BF16), 1 thread"
QUALITY = {"cam": 0.2, "base": 0.35, "refined": 0.5, "oaa": 0.4, "oaa_plus": 0.6, "mixed": 0.7, "tenth": 0.5}


def draw(number: int) -> tuple[Any, Any, list[int]]:
    """A photo, its mask and tags."""
    random = np.random.default_rng(number)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    photo = random.integers(60, 120, (SIDE, SIDE, 3), dtype=np.uint8)
    for class_id in random.choice([1, 2, 3], 1 + number % 2, replace=False).tolist():
        (x, y), r = random.integers(10, SIDE - 10, 2).tolist(), int(random.integers(6, 12))
        if class_id == 2:
            cv2.rectangle(mask, (x - r, y - r), (x + r, y + r), class_id, -1)
        else:
            cv2.circle(mask, (x, y), r, class_id, -1)
    photo[mask > 0] //= 2
    for class_id in range(1, 4):
        photo[..., class_id - 1][mask == class_id] += 120
    return photo, mask, sorted(set(mask.ravel().tolist()) - {0})


def blurred(mask: Any, class_id: int, quality: float) -> Any:
    """A map that covers the more of the class the higher the quality."""
    field = cv2.distanceTransform((mask == class_id).astype(np.uint8), cv2.DIST_L2, 5)
    field = cv2.GaussianBlur(field ** (1.2 - quality), (0, 0), 3)
    return cv2.resize((255 * field / max(field.max(), 1e-5)).astype(np.uint8), (SIDE // 4, SIDE // 4))


def line(classifier: str, layer: int) -> Any:
    """A feature map whose bright row tells the layer, or column if the classifier is 'base'."""
    out = np.zeros((8, 8), np.uint8)
    out[2 * layer] = 255
    return out.T.copy() if classifier == "base" else out


def damaged(mask: Any, quality: float, random: np.random.Generator, ignore: bool) -> Any:
    noise = cv2.GaussianBlur(random.random(mask.shape), (0, 0), 3)
    out = mask.copy()
    out[noise > np.quantile(noise, quality)] = 0
    if ignore:
        out[noise < np.quantile(noise, 0.1)] = 255
    return out


def experiment(raw: dict[str, Any], train: int = 8, held: int = 5, masks: bool = True) -> Graph:
    """Everything but evaluation and report, below the working directory; then those, by their stages."""
    graph = Graph(parameters.validate(raw))
    drawn = {f"i{number:03d}": draw(number) for number in range(train + held)}
    root = Path(raw["dataset"]["root"])
    (root / "JPEGImages").mkdir(parents=True)
    images = {}
    for name, (photo, mask, tags) in drawn.items():
        cv2.imwrite(str(root / f"JPEGImages/{name}.png"), photo)
        size = {"height": mask.shape[0], "width": mask.shape[1]}
        images[name] = {"file": f"JPEGImages/{name}.png", **size, "tags": tags, "mask": None, "saliency": None}
    ids = list(drawn)
    splits = {"train": ids[:train], "evaluation": ids[train:]}
    index = {"classes": NAMES, "tag_source": "tags.json", "splits": splits, "root": str(root), "images": images}
    described = dict(parts(index))
    for job in graph.jobs:
        for key, path in job.outputs.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if job.stage == "index" and key in described:
                write(path, described[key])
            elif key == "dataset":
                path.write_text(counted(drawn, splits["train"], masks).dump())
            elif key == "log":
                path.write_text(json.dumps(training_log(len(job.name)) | {"about": about(job)}))
            elif key == "layers":
                path.write_text(json.dumps(LAYERS.get(job.name, LAYERS[""])))
            elif path.suffix == ".h5":
                with arithmetic.recording(), RasterWriter(path, kind=key) as writer:
                    arithmetic.note([KIND] if job.stage in ("localization", "prediction") else [])
                    fill(writer, f"{job.stage} {key}", job.name, drawn, splits, masks)
    for job in graph.jobs:
        main = {"evaluation": evaluation.main, "report": report.main}.get(job.stage)
        if main:
            for path in job.outputs.values():
                path.parent.mkdir(parents=True, exist_ok=True)
            main(Work(job, job.inputs, job.outputs, Runtime(), "key", Path("checkpoint")))
    return graph


def counted(drawn: dict[str, Any], train: list[str], masks: bool) -> census.Census:
    """The census that the index stage would write."""
    sights = [
        census.Sight(
            name,
            "train" if name in train else "evaluation",
            tuple(tags),
            mask.shape,
            fingerprint(photo),
            np.bincount(mask.ravel(), minlength=256) if masks else None,
        )
        for name, (photo, mask, tags) in drawn.items()
    ]
    return census.take(sights, NAMES, Path("val.txt"), Path("masks"), True, Faults())


def about(job: Job) -> dict[str, str]:
    """What a training of the job's network writes into its log."""
    network: Any = models.build(job.block, len(NAMES))
    match job.stage:
        case "segmentation":
            return SegmentationTask(network, job.block).about()
        case "affinity":
            return AffinityTask(network, job.block).about()
        case _:
            return network.about()


def training_logs(graph: Graph) -> dict[str, Any]:
    """The logs that the report reads, by SECTION/NAME."""
    inputs = graph.find("report").inputs.items()
    return {name[7:]: json.loads(path.read_text()) for name, path in inputs if name.startswith("log of ")}


def training_log(seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    steps = [
        {"step": step, "epoch": step // 40, "loss": float(np.exp(-step / 50) + 0.1 * random.random()), "lr": 0.1}
        for step in range(1, 161)
    ]
    epochs = [{"epoch": epoch, "loss": 1 / (epoch + 1)} for epoch in range(4)]
    return {"steps": steps, "epochs": epochs, "arithmetic": [KIND]}


def fill(writer: RasterWriter, kind: str, name: str, drawn: Any, splits: Any, masks: bool) -> None:
    random = np.random.default_rng(5)
    quality = QUALITY.get(name, 0.9)
    used = splits["evaluation"] if kind.startswith("prediction") else splits["train"]
    if kind == "classifier snapshots":
        for epoch in (1, 2, 3):
            for key in used:
                for tag in drawn[key][2]:
                    writer.append(f"{epoch}/{key}", blurred(drawn[key][1], tag, 0.1 * epoch), tag)
    elif kind == "features features":
        for key in used[:6]:
            for layer, _ in enumerate(LAYERS.get(name, LAYERS[""]), 1):
                writer.append(key, line(name, layer), layer)
    elif kind == "saliency maps":
        for key, (_, mask, _) in drawn.items():
            writer.append(key, cv2.GaussianBlur(255 * (mask > 0).astype(np.uint8), (0, 0), 2))
    elif kind in ("ground_truth labels", "ground_truth masks"):
        for key, (_, mask, _) in drawn.items() if masks else ():
            writer.append(key, mask)
    else:
        for key in used:
            writer.add_image(key)
            _, mask, tags = drawn[key]
            for tag in tags if kind.endswith("maps") else ():
                writer.append(key, blurred(mask, tag, quality), tag)
            if kind.endswith("doubt"):
                writer.append(key, np.full((SIDE // 8, SIDE // 8), 8 * int(key[1:]) % 256, np.uint8))
            elif kind.endswith("labels"):
                writer.append(key, damaged(mask, quality, random, ignore=kind != "prediction labels"))
