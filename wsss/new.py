"""Read photos and their tags, and write a profile that ``wsss run`` trains on. No photo is copied or changed."""

import argparse
import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.reader import FolderName
from pipeline.errors import PipelineError, counted
from wsss import recipe
from wsss.run import BASE, PROFILES, require_checkout

if TYPE_CHECKING:
    from pipeline.config.dataset import Dataset
    from pipeline.data.faults import Faults
    from wsss.draft import Draft, Request

EPILOG = "The tags are recognised by their content: see docs/OWN_IMAGES.md."
REMBG = "rembg"
FILES = {"classes": "classes.txt", "tags": "tags.json", "train": "train.txt", "evaluation": "evaluation.txt"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="the folder of the photos, with any subfolders")
    parser.add_argument(
        "tags",
        type=Path,
        metavar="TAGS",
        help="a file (CSV, JSON, text, COCO, Label Studio, CVAT), a folder of VOC XML, or PHOTOS itself if its "
        "subfolders are named after classes",
    )
    parser.add_argument("--name", default="mine", help="of the profile and of its results; default: mine")
    parser.add_argument("--masks", type=Path, metavar="FOLDER", help="masks of some photos, which measure the result")
    parser.add_argument(
        "--saliency",
        metavar="FOLDER",
        help="grey maps of what stands out in each photo, or 'rembg' to compute them; they improve the masks",
    )
    parser.add_argument(
        "--weights",
        default="imagenet",
        metavar="FILE",
        help="pretrained weights: a file, 'imagenet' to download them, or 'none'; default: imagenet",
    )
    parser.add_argument(
        "--evaluation", type=float, default=0.1, metavar="SHARE", help="of photos not to train on; default: 0.1"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the split and of the trainings; default: 1")
    parser.add_argument(
        "--leave-out", nargs="+", default=[], metavar="CLASS", help="classes to ignore; their photos stay as negatives"
    )
    parser.add_argument(
        "--blanks",
        choices=("separate", "belong"),
        help="whether a blank separates two tags ('cat dog') or belongs to a class name ('golden retriever'); default: "
        "recognised by the content",
    )
    parser.add_argument("--negatives", action="store_true", help="photos that the tags do not name show no class")
    parser.add_argument(
        "--skip-broken", action="store_true", help="leave out photos that cannot be read, and name each in the summary"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the profile and its lists")


def run(options: argparse.Namespace) -> int:
    """Write the dataset and the profile, print a summary, and return 0.

    Raises:
        PipelineError: photos, tags, masks or options have faults; it has a line for each. Nothing is written then.
    """
    require_checkout("new")
    from pipeline.data.faults import Faults
    from pipeline.stores.files import atomic
    from wsss import draft

    faults = Faults()
    _check_options(options, faults)
    profile, root = PROFILES / f"{options.name}.yaml", Path("data") / options.name
    machine = _machine()
    weights = None if options.weights == "none" else options.weights
    backbone = recipe.backbone(weights, machine)
    if weights not in (None, "imagenet"):
        backbone = fitting_backbone(weights, backbone, faults)
    folder = None if options.saliency in (None, REMBG) else Path(options.saliency)
    request = draft.Request(
        options.photos,
        options.tags,
        options.masks,
        min(max(options.evaluation, 0.0), 1.0),
        max(options.seed, 0),
        options.leave_out,
        options.blanks,
        options.negatives,
        options.skip_broken,
    )
    threads = len(os.sched_getaffinity(0))
    dataset = draft.read(request, faults, threads, progress) if _exist(request, faults) else None
    temporary = root.with_name(f".{options.name}.partial")
    remarks = []
    if dataset is not None:
        try:
            dataset.write(temporary, FILES)
            block = _block(options, temporary)
            shown = {str(Path(block.root) / block.images): str(options.photos)}
            if block.masks:
                shown[str(Path(block.root) / block.masks)] = str(options.masks)
            maps = folder if folder and folder.is_dir() else None
            remarks = draft.check(block, maps, shown, faults, threads, progress)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    faults.check()
    assert dataset is not None
    source = recipe.Source(
        options.name,
        str(root),
        _relative(options.photos, root),
        options.masks and _relative(options.masks, root),
        options.saliency,
        weights,
        backbone,
        options.seed,
        len(dataset.train),
        len(dataset.evaluation),
        shlex.join(["wsss", *options.arguments]),
    )
    dataset.write(root, FILES)
    with atomic(profile) as file:
        file.write_text(recipe.write(source, machine), encoding="utf-8")
    print(*_summary(dataset, source, machine, [*dataset.remarks, *remarks], profile), sep="\n")
    return 0


def progress(items: Iterable[Any], label: str, total: int) -> Iterable[Any]:
    """Iterate with a bar on a terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=label, total=total, leave=False, disable=not sys.stderr.isatty())


def fitting_backbone(weights: str, usual: str, faults: "Faults") -> str:
    """The backbone that a file of weights fits, ``usual`` first; without one, a fault and ``usual``."""
    from pipeline.config.registry import BACKBONES
    from pipeline.config.schema import Backbone
    from pipeline.networks.weights import load_weights

    names = [usual, *(name for name in recipe.BACKBONES if name != usual)]
    reasons: list[str] = []
    for name in names:
        try:
            load_weights(BACKBONES[name](Backbone(name, output_stride=16)), weights)
        except PipelineError as error:
            reasons.extend(error.lines[:1])
        else:
            return name
    if len(set(reasons)) == 1:  # the file itself
        faults.add("weights", f"--weights {reasons[0]}")
    else:
        line = f"--weights {weights}: fits none of the networks {', '.join(names)}; use ImageNet weights of one of them"
        faults.add("weights", line)
    return usual


def _check_options(options: argparse.Namespace, faults: "Faults") -> None:
    form = FolderName.__metadata__[0]  # type: ignore[attr-defined]
    if (fault := form.fault(options.name)) is not None:
        faults.add("option", f"--name {options.name}: {fault}")
        options.name = "mine"
    elif options.name == _base_experiment():
        faults.add("option", f"--name {options.name}: is the experiment of {BASE}; choose another name")
    if not 0 < options.evaluation < 1:
        faults.add("option", f"--evaluation {options.evaluation:g}: must be above 0 and below 1, such as 0.1")
    if options.seed < 0:
        faults.add("option", f"--seed {options.seed}: must be at least 0")
    if options.saliency == REMBG and importlib.util.find_spec(REMBG) is None:
        faults.add("option", "--saliency rembg: rembg is not installed; pip install 'rembg[cpu]'")
    elif options.saliency not in (None, REMBG) and not Path(options.saliency).is_dir():
        faults.add("option", f"--saliency {options.saliency}: no such folder; name a folder of maps, or rembg")
    if options.force:
        return
    files = [PROFILES / f"{options.name}.yaml", *(Path("data") / options.name / file for file in FILES.values())]
    if there := [str(file) for file in files if file.exists()]:
        fix = "choose another --name, or overwrite them with --force"
        faults.add("option", f"{', '.join(there)}: {'exists' if len(there) == 1 else 'exist'}; {fix}")


def _base_experiment() -> Any:
    from pipeline.config.params import read

    return read([Path(BASE)]).get("experiment")


def _exist(request: "Request", faults: "Faults") -> bool:
    """Whether photos, tags and masks exist; a fault for each that does not."""
    named = {"PHOTOS": request.photos, "TAGS": request.tags, "--masks": request.masks}
    absent = False
    for name, path in named.items():
        folder = name != "TAGS"
        if path is not None and not (path.is_dir() if folder else path.exists()):
            what = "no such folder" if folder else "no such file or folder"
            faults.add("option", f"{name} {path}: {what}; correct the path")
            absent = True
    return not absent


def _machine() -> recipe.Machine:
    from pipeline import cards

    return recipe.Machine(len(cards.visible()), len(os.sched_getaffinity(0)))


def _block(options: argparse.Namespace, root: Path) -> "Dataset":
    """The dataset of the profile, at ``root``."""
    from pipeline.config.dataset import Dataset

    masks = options.masks and _relative(options.masks, root)
    values: dict[str, Any] = {"root": str(root), "images": _relative(options.photos, root), "masks": masks, **FILES}
    return Dataset(**values)


def _relative(path: Path, root: Path) -> str:
    """The path as ``dataset`` holds it: absolute if the user gave it so, else relative to ``root``."""
    return str(path) if path.is_absolute() else os.path.relpath(path, root)


def _summary(
    dataset: "Draft", source: recipe.Source, machine: recipe.Machine, remarks: list[str], profile: Path
) -> list[str]:
    counts = dataset.counts()
    named = sorted(dataset.classes, key=lambda name: -counts[name])
    assumed = f", {dataset.assumed} of them not named by the tags" if dataset.assumed else ""
    masks = (
        f"measured on the masks of {len(dataset.evaluation)}" if source.masks else "no masks, so nothing is measured"
    )
    return [
        f"photos:    {len(dataset.tags)}: {len(dataset.train)} to train on, {len(dataset.evaluation)} held out",
        f"tags:      {dataset.kind}",
        f"classes:   {len(named)}: {', '.join(f'{name} {counts[name]}' for name in named)}",
        f"negatives: {counted(dataset.negatives, 'photo')} without any class{assumed}",
        f"masks:     {masks}",
        *(f"note: {line}" for line in remarks),
        f"profile:   {profile}, to read and change; its lists are in {source.root}",
        f"plan:      row {recipe.row(source)} on {source.backbone}, {recipe.duration(source, machine)}",
        f"next:      wsss run {source.name}",
    ]
