"""The stages as a graph of jobs: which files each reads and writes, and the exact parameters it depends on.

The Snakefile and dvc.yaml state the same graph in their own languages; tests/test_definitions.py holds the three equal.
"""

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from pipeline import params as parameters
from pipeline import references
from pipeline.contradictions import TRAINED
from pipeline.errors import PipelineError
from pipeline.registry import plain
from pipeline.schema import MAKERS, Params, backbones
from pipeline.stores import manifest
from pipeline.stores.files import code_hash, fingerprint

_DATA = ("pipeline/data",)
_LEARN = (
    "pipeline/data",
    "pipeline/networks",
    "pipeline/methods",
    "pipeline/refinement",
    "pipeline/training",
    "pipeline/inference/models.py",
)
CODE: dict[str, tuple[str, ...]] = {
    "demo": ("stages/demo.py", "pipeline/data/demo.py", "pipeline/data/palette.py"),
    "download": (
        "stages/download.py",
        "pipeline/data/download.py",
        "pipeline/data/palette.py",
        "pipeline/data/matlab.py",
    ),
    "coco_stuff": (
        "stages/coco_stuff.py",
        "pipeline/data/coco_stuff.py",
        "pipeline/data/palette.py",
        "pipeline/data/matlab.py",
    ),
    "index": ("stages/index.py", *_DATA),
    "ground_truth": ("stages/ground_truth.py", *_DATA),
    "saliency": ("stages/saliency.py", *_DATA, "pipeline/labels"),
    "classifier": ("stages/classifier.py", *_LEARN),
    "features": ("stages/features.py", *_LEARN, "pipeline/inference"),
    "refinement": ("stages/refinement.py", *_LEARN),
    "localization": ("stages/localization.py", *_LEARN, "pipeline/inference"),
    "affinity": ("stages/affinity.py", *_LEARN),
    "walk": ("stages/walk.py", *_LEARN, "pipeline/inference"),
    "pseudo_labels": ("stages/pseudo_labels.py", *_DATA, "pipeline/labels"),
    "mixture": ("stages/mixture.py",),
    "segmentation": ("stages/segmentation.py", *_LEARN),
    "one_step": ("stages/one_step.py", *_LEARN, "pipeline/labels/crf.py"),
    "prediction": ("stages/prediction.py", *_LEARN, "pipeline/inference", "pipeline/labels/crf.py"),
    "evaluation": ("stages/evaluation.py", "pipeline/evaluation"),
    "report": ("stages/report.py", "pipeline/report"),
}


GIVEN = {  # inputs that a person brings, and the mend where one is missing
    "root": "put the dataset there, or correct dataset.root",
    "store": "put the file there, or correct saliency.path",
    "weights": "put the file there",
    "extra": "put the images there, or correct dataset.extra",
    "coco_stuff": "unpack COCO-Stuff 10k v1.1 there, or correct dataset.coco_stuff",
}
STAGES = {  # of the sections whose blocks may feed each other
    "localizations": "localization",
    "refinements": "refinement",
    "affinities": "affinity",
    "walks": "walk",
    "pseudo_labels": "pseudo_labels",
}


@dataclass(frozen=True)
class Job:
    """One run of a stage. ``values`` are all of the parameters that the stage may look at, some as dataclasses."""

    stage: str
    name: str  # of the block; '' where the stage runs once
    inputs: dict[str, Path]
    outputs: dict[str, Path]
    values: dict[str, Any]
    block: Any = None  # the block as its dataclass
    home: Path | None = None
    origin: str = ""  # of a prediction and its evaluation: the section of the network

    @cached_property
    def params(self) -> dict[str, Any]:
        """The parameters as JSON holds them. This reads the settings of the block's choices, and thus imports them.

        Raises:
            PipelineError: with every fault of the settings, a line each.
        """
        return cast(dict[str, Any], plain(self.values))

    @property
    def label(self) -> str:
        return f"{self.stage} {self.name}".strip()

    @property
    def folder(self) -> Path:
        """Where the manifest lies: beside the outputs; a dataset's lies with the results, not among its images."""
        return self.home or next(iter(self.outputs.values())).parent

    @property
    def code(self) -> tuple[str, ...]:
        return CODE[self.stage]

    def key(self, output: Path) -> str:
        """What the manifest calls an output: its name, or ./PATH where it does not lie beside the manifest."""
        return output.name if output.parent == self.folder else f"./{output.as_posix()}"


class Graph:
    """All jobs of a set of parameters, in an order in which they can run."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.results = Path("results") / params.experiment
        self.jobs = list(self._jobs())

    def missing(self) -> list[str]:
        """A line for each file that no job makes and that is not there, by the first job that reads it."""
        made: set[Path] = set()
        lines: dict[Path, str] = {}
        for job in self.jobs:
            lines |= {path: line for path, line in missing(job).items() if path not in made and path not in lines}
            made.update(job.outputs.values())
        return list(lines.values())

    def find(self, stage: str, name: str = "") -> Job:
        """Raises PipelineError naming the blocks that there are."""
        named = [job for job in self.jobs if job.stage == stage]
        for job in named:
            if job.name == name:
                return job
        choices = ", ".join(job.name for job in named) or "nothing: params.yaml has no such block"
        raise PipelineError(f"{stage} {name}: no such block; {stage} can run {choices}")

    def _file(self, reference: str, name: str) -> Path:
        return self.results / reference / name

    def _jobs(self) -> Iterator[Job]:
        params = self.params
        dataset, seed = params.dataset, {"seed": params.seed}
        root = Path(dataset.root)
        index = self._file("index", "index.json")
        masks = self._file("ground_truth", "labels.h5")
        saliency = self._file("saliency", "maps.h5")
        made = self.results / "dataset"
        if dataset.demo:
            yield Job("demo", "", {}, {"root": root}, {"demo": dataset.demo}, dataset.demo, made)
        elif dataset.download:
            yield Job("download", "", {}, {"root": root}, {"download": dataset.download}, dataset, made)
        elif dataset.coco_stuff:
            archive = {"coco_stuff": Path(dataset.coco_stuff)}
            yield Job("coco_stuff", "", archive, {"root": root}, {}, dataset, made)
        folders = {"root": root} | ({"extra": Path(dataset.extra)} if dataset.extra else {})
        yield Job("index", "", folders, {"index": index}, self._index_params(), dataset)
        yield Job("ground_truth", "", {"index": index}, {"labels": masks}, {}, None)
        sources = {"index": index}
        if params.saliency.kind == "store" and params.saliency.path:
            sources["store"] = Path(params.saliency.path)
        yield Job("saliency", "", sources, {"maps": saliency}, {"saliency": params.saliency}, params.saliency)

        trained = ("model", "log")
        for name, classifier in params.classifiers.items():
            yield self._job(
                "classifier", "classifiers", name, {"index": index}, classifier, (*trained, "maps", "snapshots"), seed
            )
        for name in params.classifiers:
            files = {"index": index, "model": self._file(f"classifiers/{name}", "model.pt")}
            home = f"features/{name}"
            pictures = {"features": self._file(home, "features.h5"), "layers": self._file(home, "layers.json")}
            yield Job("features", name, files, pictures, {"gallery": params.gallery})
        for name, learner in params.one_step.items():
            yield self._job("one_step", "one_step", name, {"index": index}, learner, trained, seed)
        for reference in references.in_order(params):
            yield self._made(reference, index, saliency, seed)
        for name, mixture in params.mixtures.items():
            files = {"index": index, "labels": self._file(mixture.labels, "labels.h5"), "ground_truth": masks}
            yield self._job("mixture", "mixtures", name, files, mixture, ("labels",), seed)
        for name, network in params.segmentations.items():
            files = {"index": index, "labels": self._file(network.labels, "labels.h5")}
            yield self._job("segmentation", "segmentations", name, files, network, trained, seed)
        for name, model in references.rows(params).items():
            files = {"index": index, "model": self._file(model, "model.pt")}
            job = self._job("prediction", "predictions", name, files, params.test, ("labels",))
            yield replace(job, origin=model.split("/")[0])
        yield from self._evaluations(index, masks)

    def _made(self, reference: str, index: Path, saliency: Path, seed: dict[str, int]) -> Job:
        """The job of a block between classifiers and segmentations."""
        section, name = reference.split("/")
        block = getattr(self.params, section)[name]
        outputs: tuple[str, ...]
        match section:
            case "localizations":
                files, outputs, extra = {"model": self._file(block.model, "model.pt")}, ("maps",), {}
            case "refinements":
                files, outputs, extra = {"maps": self._file(block.source, "maps.h5")}, ("model", "log"), seed
            case "affinities":
                files, outputs, extra = {"labels": self._file(block.labels, "labels.h5")}, ("model", "log"), seed
            case "walks":
                model, maps = self._file(block.affinity, "model.pt"), self._file(block.maps, "maps.h5")
                files, outputs, extra = {"model": model, "maps": maps}, ("maps",), {}
            case _:
                files = {"maps": self._file(block.source, "maps.h5"), "saliency": saliency}
                outputs, extra = ("labels",), {}
        return self._job(STAGES[section], section, name, {"index": index, **files}, block, outputs, extra)

    def _evaluations(self, index: Path, masks: Path) -> Iterator[Job]:
        params = self.params
        scores: dict[str, Path] = {}
        rows = references.rows(params)
        stores: dict[str, Path] = {"saliency": self._file("saliency", "maps.h5"), "ground_truth": masks}
        for section, kept in [
            ("classifiers", "maps"),
            ("localizations", "maps"),
            ("walks", "maps"),
            ("pseudo_labels", "labels"),
            ("mixtures", "labels"),
            ("predictions", "labels"),
        ]:
            for name in rows if section == "predictions" else getattr(params, section):
                reference = f"{section}/{name}"
                files = {"index": index, "ground_truth": masks, kept: self._file(reference, f"{kept}.h5")}
                if section == "classifiers":
                    files["snapshots"] = self._file(reference, "snapshots.h5")
                scores[f"scores of {reference}"] = self._file(f"evaluation/{reference}", "scores.json")
                stores[reference] = files[kept]
                origin = rows[name].split("/")[0] if section == "predictions" else ""
                made = {"scores": scores[f"scores of {reference}"]}
                yield Job("evaluation", reference, files, made, {}, origin=origin)
        outputs = {
            "report": self.results / "report.html",
            "table": self.results / "metrics.json",
            "metrics": Path("metrics.json"),
        }
        wanted = {"method": params.method, "gallery": params.gallery, "rows": self._chains()}
        for section in TRAINED:
            for name in getattr(params, section):
                stores[f"log of {section}/{name}"] = self._file(f"{section}/{name}", "log.json")
        for reference in (f"features/{name}" for name in params.classifiers):
            stores[reference] = self._file(reference, "features.h5")
            stores[f"layers of {reference}"] = self._file(reference, "layers.json")
        yield Job("report", "", {"index": index, **stores, **scores}, outputs, wanted, params)

    def _chains(self) -> dict[str, dict[str, str]]:
        """For each row the references that its numbers come from: maps, labels, predictions."""
        chains: dict[str, dict[str, str]] = {}
        for name in references.rows(self.params):
            chains[name] = {"predictions": f"predictions/{name}"}
            if name in self.params.segmentations:
                labels = chains[name]["labels"] = self.params.segmentations[name].labels
                if rule := references.label_rule(self.params, labels):
                    chains[name]["maps"] = rule.source
        return chains

    def _index_params(self) -> dict[str, Any]:
        kept = {key: value for key, value in plain(self.params.dataset).items() if key not in MAKERS}
        saliency = self.params.saliency
        return {"dataset": kept, "saliency": saliency.path if saliency.kind == "folder" else None}

    def _job(
        self,
        stage: str,
        section: str,
        name: str,
        inputs: dict[str, Path],
        block: Any,
        outputs: tuple[str, ...],
        extra: dict[str, Any] | None = None,
    ) -> Job:
        suffix = {"model": "pt", "log": "json", "maps": "h5", "labels": "h5", "snapshots": "h5"}
        files = {key: self._file(f"{section}/{name}", f"{key}.{suffix[key]}") for key in outputs}
        return Job(stage, name, inputs | weight_files(block), files, {**(extra or {}), "block": block}, block)


def weight_files(block: Any) -> dict[str, Path]:
    """The files that a trained block's backbones start from."""
    given = {key: value.weights for key, value in backbones(block).items() if value.weights not in (None, "imagenet")}
    return {f"weights of {key}": Path(file) for key, file in given.items() if file is not None}


def missing(job: Job) -> dict[Path, str]:
    """The job's inputs that are not there, and a line on each."""
    return {
        path: f"{path}: missing ({name} of {job.label}); {GIVEN.get(name.split()[0], 'run the stage that makes it')}"
        for name, path in job.inputs.items()
        if not path.exists()
    }


def is_fresh(job: Job, hashes: dict[Path, str]) -> bool:
    """Whether the job's outputs are there and its manifest names these inputs, parameters and code.

    ``hashes`` keeps what was already looked up: of a made input its own manifest's word, of any other its bytes.
    """
    found = manifest.read(job.folder)
    if found is None or found.get("stage") != job.label or not all(path.exists() for path in job.outputs.values()):
        return False
    if found["params"] != job.params or found["code"] != code_hash(job.code):
        return False
    shared = [path for path in job.outputs.values() if path.parent != job.folder and path.is_file()]
    if any(found["outputs"].get(job.key(path)) != fingerprint(path) for path in shared):
        return False  # as metrics.json, which each experiment writes
    for key, path in job.inputs.items():
        if path not in hashes:
            if not path.exists():
                return False
            beside = manifest.read(path.parent)
            made = beside.get("outputs", {}).get(path.name) if beside else None
            hashes[path] = made or fingerprint(path)
        if found["inputs"].get(key) != hashes[path]:
            return False
    return True


def stale(graph: Graph) -> list[Job]:
    """Jobs whose outputs are missing or do not fit, and all jobs that follow from them, in order."""
    out: list[Job] = []
    remade: set[Path] = set()
    hashes: dict[Path, str] = {}
    for job in graph.jobs:
        if remade.intersection(job.inputs.values()) or not is_fresh(job, hashes):
            out.append(job)
            remade.update(job.outputs.values())
    return out


def main() -> None:
    """Print the command of every job, in order: ``python -m pipeline.graph [FILE ...] | sh -e`` runs all of them."""
    files = sys.argv[1:] or ["params.yaml"]
    try:
        graph = Graph(parameters.load([Path(name) for name in files], resolve=True))
    except PipelineError as error:
        sys.exit("\n".join(f"error: {line}" for line in error.lines))
    for job in graph.jobs:
        print(shlex.join(["python", "-m", f"stages.{job.stage}", *filter(None, [job.name]), "--params", *files]))


if __name__ == "__main__":
    main()
