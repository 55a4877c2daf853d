"""What ``wsss predict`` and ``wsss export`` share: options, loading of the model, and the end of a run."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError
from pipeline.stores.files import sha256
from wsss.folder import OutputFolder
from wsss.formats import FORMATS

if TYPE_CHECKING:
    from wsss.model import Model


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of formats and of the network."""
    parser.add_argument(
        "--formats", default="png", metavar="LIST", help=f"comma-separated list of {', '.join(FORMATS)}; default: png"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="arithmetic threads; 0: all available cores")
    parser.add_argument("--no-crf", action="store_true", help="leave out the dense CRF of the model's test protocol")
    parser.add_argument(
        "--megapixels",
        type=float,
        metavar="N",
        help="show the network larger photos reduced to this; default: dataset.working_megapixels of the training",
    )


def load_model(path: Path, options: argparse.Namespace) -> "tuple[Model, dict[str, Any]]":
    """Load the model and return it with what all outputs depend on (``Record.basis``).

    Raises:
        PipelineError: the file is not a model, or an option is out of range.
    """
    if options.megapixels is not None and not 0.001 <= options.megapixels <= 1000:
        raise PipelineError(f"--megapixels {options.megapixels:g}: must be at least 0.001 and at most 1000")
    from pipeline.config.registry import plain
    from pipeline.training.settings import prepare
    from wsss.model import load

    if options.threads < 0:
        raise PipelineError(f"--threads {options.threads}: must be at least 1, or 0 for all cores")
    device = str(prepare(options.device, options.threads or len(os.sched_getaffinity(0))))
    model = load(path, device, crf=not options.no_crf, megapixels=options.megapixels)
    return model, {"model": sha256(path), "test": plain(model.test), "megapixels": model.megapixels}


def report(folder: OutputFolder, counts: str, others: int, faults: list[str]) -> int:
    """Print the end of a run: what was written, and a line for each broken photo. Return the exit status."""
    print(f"{folder.root}: {counts}")
    if others:
        kept = "1 photo of an earlier run" if others == 1 else f"{others} photos of earlier runs"
        verbs = ("keeps its", "is") if others == 1 else ("keep their", "are")
        print(
            f"{folder.root}: {kept} with another model or other options {verbs[0]} own files, "
            f"but {verbs[1]} left out of the files that describe all photos"
        )
    for line in faults:
        print(f"error: {line}", file=sys.stderr)
    return 1 if faults else 0
