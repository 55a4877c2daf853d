"""Per-class scores of an experiment as a table for other programs.

``python -m pipeline.report.per_class results/demo > per_class.csv`` writes CSV, and with ``--json`` JSON. A line holds
an output, the name of a score, its mean and the value of each class, in [0, 1]. Maps have recall, noise, and IoU at
their best background score; pseudo labels and predictions have IoU and accuracy. A class without a value is absent
from masks and output, and left out of the mean.

Lines without classes hold the mIoU as others count it: ``miou_as_CODE`` of labels and predictions, by the conventions
of a public code (``pipeline.evaluation.confusion``), and ``miou_at_PAPER`` of maps, at the background score of a
paper's code (``pipeline.evaluation.scores``).
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError, exit_on_faults

# Key of the values of each class in scores.json -> name of the score, and key of its mean
SCORES = {
    "recall_per_class": ("recall", "recall"),
    "noise_per_class": ("noise", "noise"),
    "best_threshold_iou": ("iou_at_best_threshold", "best_threshold_miou"),
    "iou": ("iou", "miou"),
    "class_accuracy": ("accuracy", None),
}


def per_class(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a line for each score of each evaluated output of the experiment in ``folder``, in order of their names.

    Raises:
        PipelineError: the folder has no scores, or a file of them is not JSON.
    """
    files = sorted((folder / "evaluation").rglob("scores.json"))
    if not files:
        raise PipelineError(f"{folder}: has no scores; name the folder of an experiment, such as results/demo")
    for file in files:
        try:
            scores = json.loads(file.read_text())
        except ValueError as error:
            raise PipelineError(f"{file}: not JSON ({error}); run its stage again") from None
        output = file.parent.relative_to(folder / "evaluation").as_posix()
        for key, (name, mean) in SCORES.items():
            if key in scores:
                values = {class_name: scores[key].get(class_name) for class_name in ["background", *scores["classes"]]}
                yield {"output": output, "score": name, "mean": scores.get(mean), **values}
        bare = dict.fromkeys(["background", *scores["classes"]])
        for code, miou in scores.get("miou_as", {}).items():
            yield {"output": output, "score": f"miou_as_{code}", "mean": miou, **bare}
        for paper, found in scores.get("miou_at", {}).items():
            yield {"output": output, "score": f"miou_at_{paper}", "mean": found["miou"], **bare}


def main(arguments: list[str] | None = None) -> None:
    """Print the table of an experiment."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.report.per_class")
    parser.add_argument("folder", type=Path, help="folder of an experiment, such as results/demo")
    parser.add_argument("--json", action="store_true", help="write JSON instead of CSV")
    with exit_on_faults():
        options = parser.parse_args(arguments)
        lines = list(per_class(options.folder))
        if options.json:
            print(json.dumps(lines, indent=1, ensure_ascii=False))
            return
        writer = csv.DictWriter(sys.stdout, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
