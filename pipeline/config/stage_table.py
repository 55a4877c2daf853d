"""The table of all stages: their inputs, outputs, parameters and resources.

Every other description of the workflow is derived from this table: the jobs (``pipeline.workflow.graph``), the
references that blocks may contain (``pipeline.config.references``), Snakemake's rules (``Snakefile``) and dvc.yaml
(``pipeline.workflow.dvc``).
"""

from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Literal


@dataclass(frozen=True)
class Input:
    """A file that another job writes: either ``job``, which runs once, or the job that a block's ``key`` names."""

    file: str
    job: str = ""
    key: str = ""  # a key of the block; its value is SECTION/NAME or the name of a job that runs once
    allowed: tuple[str, ...] = ()  # sections, and jobs that run once, that ``key`` may refer to


@dataclass(frozen=True)
class External:
    """A file or folder that the user supplies."""

    key: str  # the key of params.yaml that holds the path
    fix: str  # the fix to suggest if the path does not exist
    saliency_kind: str = ""  # the path is read only if saliency.kind has this value
    parts: tuple[str, ...] = ()  # of a folder: the files and folders in it that are read; all if empty
    depth: int = 1  # levels of folders that are read in ``parts``


@dataclass(frozen=True)
class Kind:
    """A kind of output to evaluate, on the images of a split. ``title`` heads its columns in the report."""

    title: str
    split: str


@dataclass(frozen=True)
class Stage:
    """A program in ``stages/``. It has a single job, one job per block of a section, or one per job of other stages.

    File names have no folder. A job refers to each file by its stem: ``model`` is model.pt.
    """

    name: str
    folder: str  # in results/EXPERIMENT; if the stage has many jobs, each has its own subfolder
    reads: dict[str, Input] = field(default_factory=dict)
    writes: tuple[str, ...] = ()
    section: str = ""  # section of params.yaml; the stage has a job for each of its blocks
    targets: tuple[str, ...] = ()  # folders of other stages; the stage has a job for each of their jobs
    of_tables: bool = False  # the stage has a job for each of the papers' tables (``tables`` of params.yaml)
    target_files: tuple[str, ...] = ()  # stems of the files that it reads from that job, if the job writes them
    qualified_names: bool = False  # its jobs are named FOLDER/NAME, since jobs in different folders share names
    settings: str = ""  # key of params.yaml that holds the settings, if they are not a block
    params: tuple[str, ...] = ()  # other keys of params.yaml that the results depend on
    external: tuple[str, ...] = ()  # keys of EXTERNAL: user-supplied inputs
    keeps_user_files: bool = False  # its output folder may hold files of the user, such as saliency maps
    trains: bool = False
    gpu: bool = False
    # Cores of a job on a cluster node, and the most that it gets of a machine with a GPU. Without a GPU it gets one.
    threads: int = 1
    thread_use: Literal["", "arithmetic", "loader", "workers", "both"] = ""  # see ``shares``
    first_seed_only: bool = False  # only the report reads its outputs, and it shows those of the first seed
    effort: float = 1.0  # rough duration of a job relative to other stages, for the estimate of the time left

    def arguments(self, cores: int, on_gpu: bool = False, processes: int = 1) -> list[str]:
        """Return the command-line arguments that make the program use this number of cores; see ``shares``."""
        shares = zip(("--threads", "--workers"), self.shares(cores, on_gpu, processes), strict=True)
        return [word for name, share in shares if share is not None for word in (name, str(share))]

    def shares(self, cores: int, on_gpu: bool = False, processes: int = 1) -> tuple[int | None, int | None]:
        """Divide cores into arithmetic threads and worker processes; None for what the program does not have.

        Both together are as many as the cores, unless they take turns.

        Args:
            on_gpu: whether a GPU does the arithmetic of a stage with ``gpu``.
            processes: number of processes that share the job, each with its part of the threads and workers.
        """
        match self.thread_use:
            case "arithmetic":
                return cores, None
            case "loader":
                threads = _arithmetic_threads(max(1, cores // processes), on_gpu) * processes
                # A GPU waits for images that the process loads itself, so that each process has a worker in any case.
                return threads, max(processes, cores - threads) if on_gpu else max(0, cores - threads)
            case "both":  # the network waits while the workers run the CRF, and they wait for the network
                return cores, cores
            case "workers":
                return None, cores
        return None, None

    @property
    def has_many_jobs(self) -> bool:
        """Whether the stage has a job per block, per target or per table, rather than a single job."""
        return bool(self.section or self.targets or self.of_tables)

    def output(self, stem: str) -> str | None:
        """Return the name of the output with this stem; None if the stage has none."""
        return next((file for file in self.writes if PurePath(file).stem == stem), None)


def _arithmetic_threads(cores: int, on_gpu: bool) -> int:
    """Return how many of the cores of a training's process compute; the others load images.

    With a GPU, these threads only start its kernels. On a CPU, an image takes much longer to learn than to load.
    """
    if on_gpu:
        return min(2, max(1, cores // 4))
    return cores if cores <= 2 else cores - max(1, cores // 8)


EXTERNAL = {
    "root": External("dataset.root", "put the dataset there (data/README.md has the layout), or correct dataset.root"),
    "extra": External("dataset.extra", "put the images there, or correct dataset.extra"),
    "coco_stuff": External(
        "dataset.coco_stuff",
        "unpack COCO-Stuff 10k v1.1 there, or correct dataset.coco_stuff",
        parts=("images", "annotations", "imageLists"),
    ),
    "cub": External(
        "dataset.cub",
        "unpack CUB_200_2011.tgz there, or correct dataset.cub",
        parts=(
            *("images", "images.txt", "train_test_split.txt", "image_class_labels.txt", "bounding_boxes.txt"),
            "classes.txt",
        ),
        depth=2,
    ),
    "maps of saliency": External("saliency.path", "put the maps there, or correct saliency.path", "folder"),
    "store": External("saliency.path", "put the file there, or correct saliency.path", "store"),
}
KINDS = {
    "maps": Kind("Maps", "train"),
    "labels": Kind("Pseudo labels", "train"),
    "predictions": Kind("Segmentation", "evaluation"),
}
REPORTED = (
    "maps",
    "labels",
    "doubt",
    "features",
    "layers",
    "log",
    "scores",
    "boxes",
)  # stems of the outputs that the report reads of all jobs; its own ``reads`` name the others
SUMMARISED = ("log", "scores")  # those that it reads of the jobs of further seeds

# A stage reads as little of the index as it needs (``pipeline.data.parts``): an image in the evaluation list retrains
# nothing, and masks affect only the stages that read them.
_INDEX = {"index": Input("index.json", job="index")}
_TRAINING = {"index": Input("train.json", job="index")}
_MASKS = {"ground_truth": Input("masks.h5", job="ground_truth")}
_TRAINING_MASKS = {"ground_truth": Input("labels.h5", job="ground_truth")}
_MAPS = ("classifiers", "localizations", "walks")


# Seconds of a job of 150 photos and 500 steps, rounded; see ``Stage.effort``.
_EFFORTS = {
    "classifier": 60.0,
    "one_step": 90.0,
    "refinement": 60.0,
    "localization": 3.0,
    "pseudo_labels": 8.0,
    "affinity": 10.0,
    "walk": 4.0,
    "segmentation": 80.0,
    "prediction": 10.0,
    "box_maps": 3.0,
}


def _training(stage: Stage) -> Stage:
    writes = ("model.pt", "log.json", *stage.writes)
    return _on_gpu(replace(stage, writes=writes, trains=True, params=("seed",)))


def _on_gpu(stage: Stage) -> Stage:
    use = stage.thread_use or ("loader" if stage.trains else "arithmetic")
    return replace(stage, reads=_TRAINING | stage.reads, gpu=True, threads=8, thread_use=use)


_REPORT = Stage(
    "report",
    "",
    _INDEX | _MASKS | {"census": Input("dataset.json", job="index")},
    ("report.html", "metrics.json"),
    params=("method", "gallery", "seed"),
)
_TABLE = (
    Stage("demo", "dataset", settings="dataset.demo"),
    Stage("download", "dataset", settings="dataset.download", keeps_user_files=True),
    Stage("coco_stuff", "dataset", external=("coco_stuff",), keeps_user_files=True),
    Stage("cub", "dataset", external=("cub",), keeps_user_files=True),
    Stage(
        "index",
        "index",
        writes=("index.json", "train.json", "saliency.json", "masks.json", "true_boxes.json", "dataset.json"),
        params=("dataset", "saliency"),
        external=("root", "extra", "maps of saliency"),
    ),
    Stage("ground_truth", "ground_truth", {"index": Input("masks.json", job="index")}, ("labels.h5", "masks.h5")),
    Stage(
        "saliency",
        "saliency",
        {"index": Input("saliency.json", job="index")},
        ("maps.h5",),
        settings="saliency",
        external=("store",),
        threads=2,
        thread_use="workers",
    ),
    _training(Stage("classifier", "classifiers", writes=("maps.h5", "snapshots.h5"), section="classifiers")),
    _training(Stage("one_step", "one_step", section="one_step")),
    _training(
        Stage(
            "refinement", "refinements", {"maps": Input("maps.h5", key="source", allowed=_MAPS)}, section="refinements"
        )
    ),
    _on_gpu(
        Stage(
            "localization",
            "localizations",
            {"model": Input("model.pt", key="model", allowed=("classifiers", "refinements", "one_step"))},
            ("maps.h5",),
            section="localizations",
        )
    ),
    Stage(
        "pseudo_labels",
        "pseudo_labels",
        _TRAINING
        | {"maps": Input("maps.h5", key="source", allowed=_MAPS), "saliency": Input("maps.h5", job="saliency")},
        ("labels.h5",),
        section="pseudo_labels",
        threads=16,
        thread_use="workers",
    ),
    _training(
        Stage(
            "affinity",
            "affinities",
            {"labels": Input("labels.h5", key="labels", allowed=("pseudo_labels",))},
            section="affinities",
        )
    ),
    _on_gpu(
        Stage(
            "walk",
            "walks",
            {
                "maps": Input("maps.h5", key="maps", allowed=_MAPS),
                "model": Input("model.pt", key="affinity", allowed=("affinities",)),
            },
            ("maps.h5",),
            section="walks",
        )
    ),
    Stage(
        "mixture",
        "mixtures",
        _TRAINING | _TRAINING_MASKS | {"labels": Input("labels.h5", key="labels", allowed=("pseudo_labels",))},
        ("labels.h5",),
        section="mixtures",
        params=("seed",),
    ),
    _training(
        Stage(
            "segmentation",
            "segmentations",
            {"labels": Input("labels.h5", key="labels", allowed=("pseudo_labels", "mixtures", "ground_truth"))},
            section="segmentations",
        )
    ),
    _on_gpu(
        Stage(
            "features",
            "features",
            writes=("features.h5", "layers.json"),
            targets=("classifiers",),
            target_files=("model",),
            params=("gallery",),
            first_seed_only=True,
        )
    ),
    _on_gpu(
        Stage(
            "prediction",
            "predictions",
            _INDEX,
            writes=("labels.h5", "doubt.h5", "model.safetensors"),
            targets=("segmentations", "one_step"),
            target_files=("model",),
            settings="test",
            params=("experiment", "seed", "dataset.working_megapixels"),
            thread_use="both",
        )
    ),
    Stage(
        "evaluation",
        "evaluation",
        _INDEX | _MASKS,
        ("scores.json",),
        targets=(*_MAPS, "pseudo_labels", "mixtures", "predictions"),
        target_files=("maps", "snapshots", "labels"),
        qualified_names=True,
    ),
    _on_gpu(
        Stage(
            "box_maps",
            "boxes",
            _INDEX | {"model": Input("model.pt", key="model", allowed=("classifiers",))},
            ("class_maps.h5",),
            section="boxes",
        )
    ),
    Stage(
        "box_scores",
        "box_scores",
        _INDEX | _MASKS | {"boxes": Input("true_boxes.json", job="index")},
        ("scores.json", "boxes.json"),
        targets=("boxes",),
        target_files=("class_maps",),
        settings="box_test",
    ),
    Stage("table", "tables", _INDEX, ("report.html", "table.json"), of_tables=True),
    replace(_REPORT, name="first_report", folder="first"),
    _REPORT,
)
STAGES = {stage.name: replace(stage, effort=_EFFORTS.get(stage.name, 1.0)) for stage in _TABLE}
FOLDERS = {stage.folder: stage for stage in _TABLE if stage.section or stage.targets}
SECTIONS = tuple(stage.section for stage in _TABLE if stage.section)
TRAINED = tuple(stage.section for stage in _TABLE if stage.trains)


def kind(folder: str) -> str:
    """Return the kind (a key of KINDS) of the outputs in an evaluated folder."""
    return folder if folder in KINDS else "maps" if FOLDERS[folder].output("maps") else "labels"


def block_sections(folder: str) -> tuple[str, ...]:
    """Return the sections whose blocks have a job in the folder."""
    if folder in SECTIONS:
        return (folder,)
    return tuple(section for other in FOLDERS[folder].targets for section in block_sections(other))


def sections(stage: Stage) -> list[tuple[str, str]]:
    """Return folder and section of the blocks for which the stage has jobs."""
    if stage.section:
        return [(stage.folder, stage.section)]
    return [(folder, section) for folder in stage.targets for section in block_sections(folder)]
