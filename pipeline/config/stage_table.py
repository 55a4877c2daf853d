"""The stages of the workflow, stated once: what each reads and writes, what its results depend on, what it runs on.

Everything else that knows the stages is derived from this table: the jobs (``graph``), the references that blocks may
make (``pipeline.config.references``, ``validation``), Snakemake's rules (``Snakefile``) and dvc.yaml (``dvc``).
"""

from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Literal


@dataclass(frozen=True)
class Input:
    """A file of another job: of ``job``, which runs once, or of the job that the block's ``key`` names."""

    file: str
    job: str = ""
    key: str = ""  # its value is SECTION/NAME, or the name of a job that runs once
    of: tuple[str, ...] = ()  # the sections, and jobs that run once, which ``key`` may name


@dataclass(frozen=True)
class External:
    """A file or folder that the user supplies."""

    key: str  # of params.yaml: it names the path
    fix: str  # what to do where nothing is there


@dataclass(frozen=True)
class Kind:
    """What an evaluation scores, on the images of a split. ``title`` heads its columns in the report."""

    title: str
    split: str


@dataclass(frozen=True)
class Stage:
    """A program in ``stages/`` and its jobs: a single one, or one for each block of a section.

    Files are named without a folder. A job knows each by its stem: ``model`` is model.pt.
    """

    name: str
    folder: str  # below results/EXPERIMENT; where there are several jobs, each has a folder of its own in it
    reads: dict[str, Input] = field(default_factory=dict)
    writes: tuple[str, ...] = ()
    section: str = ""  # of params.yaml, whose blocks are the stage's settings
    about: tuple[str, ...] = ()  # or folders of other stages: a job for each of their jobs, of which it reads ``own``
    own: tuple[str, ...] = ()  # stems of the files that it reads there, where that job writes them
    full_names: bool = False  # its jobs are called FOLDER/NAME, since jobs of several folders share names
    settings: str = ""  # the key of params.yaml with the settings, where they are no block
    params: tuple[str, ...] = ()  # further keys of params.yaml that the results depend on
    external: tuple[str, ...] = ()  # keys of EXTERNAL
    trains: bool = False
    gpu: bool = False
    threads: int = 1  # that it can use on a node of a cluster, or beside a GPU
    local_threads: int = 1  # that it gets on a plain processor, where other jobs run beside it
    uses: Literal["", "loader", "workers", "both"] = ""  # what the threads are for; see ``arguments``

    def arguments(self, threads: int) -> list[str]:
        """The command-line arguments by which the program uses this number of threads."""
        match self.uses:
            case "loader":  # with more than two threads, all but two load images
                return ["--threads", str(threads), "--workers", str(max(0, threads - 2))]
            case "both":  # arithmetic and worker processes take turns
                return ["--threads", str(threads), "--workers", str(threads)]
            case "workers":
                return ["--workers", str(threads)]
        return []

    @property
    def several(self) -> bool:
        """Whether it has a job for each of some blocks, rather than a single one."""
        return bool(self.section or self.about)

    def output(self, stem: str) -> str | None:
        """The name of the file with this stem; None where the stage writes none."""
        return next((file for file in self.writes if PurePath(file).stem == stem), None)


EXTERNAL = {
    "root": External("dataset.root", "put the dataset there, or correct dataset.root"),
    "extra": External("dataset.extra", "put the images there, or correct dataset.extra"),
    "coco_stuff": External("dataset.coco_stuff", "unpack COCO-Stuff 10k v1.1 there, or correct dataset.coco_stuff"),
    "store": External("saliency.path", "put the file there, or correct saliency.path"),
}
KINDS = {
    "maps": Kind("Maps", "train"),
    "labels": Kind("Pseudo labels", "train"),
    "predictions": Kind("Segmentation", "evaluation"),
}
REPORTED = ("maps", "labels", "features", "layers", "log", "scores")  # outputs of all stages that the report reads

_INDEX = {"index": Input("index.json", job="index")}
_MASKS = {"ground_truth": Input("labels.h5", job="ground_truth")}
_MAPS = ("classifiers", "localizations", "walks")


def _training(stage: Stage) -> Stage:
    writes = ("model.pt", "log.json", *stage.writes)
    return _on_gpu(replace(stage, writes=writes, trains=True, params=("seed",)))


def _on_gpu(stage: Stage) -> Stage:
    return replace(stage, reads=_INDEX | stage.reads, gpu=True, threads=8, uses=stage.uses or "loader")


_TABLE = (
    Stage("demo", "dataset", settings="dataset.demo"),
    Stage("download", "dataset", settings="dataset.download"),
    Stage("coco_stuff", "dataset", external=("coco_stuff",)),
    Stage("index", "index", writes=("index.json",), params=("dataset", "saliency"), external=("root", "extra")),
    Stage("ground_truth", "ground_truth", _INDEX, ("labels.h5",)),
    Stage(
        "saliency",
        "saliency",
        _INDEX,
        ("maps.h5",),
        settings="saliency",
        external=("store",),
        threads=2,
        local_threads=2,
        uses="workers",
    ),
    _training(Stage("classifier", "classifiers", writes=("maps.h5", "snapshots.h5"), section="classifiers")),
    _training(Stage("one_step", "one_step", section="one_step")),
    _training(
        Stage("refinement", "refinements", {"maps": Input("maps.h5", key="source", of=_MAPS)}, section="refinements")
    ),
    _on_gpu(
        Stage(
            "localization",
            "localizations",
            {"model": Input("model.pt", key="model", of=("classifiers", "refinements", "one_step"))},
            ("maps.h5",),
            section="localizations",
        )
    ),
    Stage(
        "pseudo_labels",
        "pseudo_labels",
        _INDEX | {"maps": Input("maps.h5", key="source", of=_MAPS), "saliency": Input("maps.h5", job="saliency")},
        ("labels.h5",),
        section="pseudo_labels",
        threads=16,
        uses="workers",
    ),
    _training(
        Stage(
            "affinity",
            "affinities",
            {"labels": Input("labels.h5", key="labels", of=("pseudo_labels",))},
            section="affinities",
        )
    ),
    _on_gpu(
        Stage(
            "walk",
            "walks",
            {
                "maps": Input("maps.h5", key="maps", of=_MAPS),
                "model": Input("model.pt", key="affinity", of=("affinities",)),
            },
            ("maps.h5",),
            section="walks",
        )
    ),
    Stage(
        "mixture",
        "mixtures",
        _INDEX | _MASKS | {"labels": Input("labels.h5", key="labels", of=("pseudo_labels",))},
        ("labels.h5",),
        section="mixtures",
        params=("seed",),
    ),
    _training(
        Stage(
            "segmentation",
            "segmentations",
            {"labels": Input("labels.h5", key="labels", of=("pseudo_labels", "mixtures", "ground_truth"))},
            section="segmentations",
        )
    ),
    _on_gpu(
        Stage(
            "features",
            "features",
            writes=("features.h5", "layers.json"),
            about=("classifiers",),
            own=("model",),
            params=("gallery",),
        )
    ),
    _on_gpu(
        Stage(
            "prediction",
            "predictions",
            writes=("labels.h5",),
            about=("segmentations", "one_step"),
            own=("model",),
            settings="test",
            uses="both",
        )
    ),
    Stage(
        "evaluation",
        "evaluation",
        _INDEX | _MASKS,
        ("scores.json",),
        about=(*_MAPS, "pseudo_labels", "mixtures", "predictions"),
        own=("maps", "snapshots", "labels"),
        full_names=True,
    ),
    Stage("report", "", _INDEX, ("report.html", "metrics.json"), params=("method", "gallery")),
)
STAGES = {stage.name: stage for stage in _TABLE}
FOLDERS = {stage.folder: stage for stage in _TABLE if stage.several}
SECTIONS = tuple(stage.section for stage in _TABLE if stage.section)
TRAINED = tuple(stage.section for stage in _TABLE if stage.trains)


def kind(folder: str) -> str:
    """What the jobs of a folder that is evaluated produce: a key of KINDS."""
    return folder if folder in KINDS else "maps" if FOLDERS[folder].output("maps") else "labels"


def blocks(folder: str) -> tuple[str, ...]:
    """The sections whose blocks have a job in the folder."""
    if folder in SECTIONS:
        return (folder,)
    return tuple(section for other in FOLDERS[folder].about for section in blocks(other))


def sections(stage: Stage) -> list[tuple[str, str]]:
    """Folder and section of the blocks that the stage has a job for."""
    if stage.section:
        return [(stage.folder, stage.section)]
    return [(folder, section) for folder in stage.about for section in blocks(folder)]
