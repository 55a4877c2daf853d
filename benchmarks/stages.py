"""Seconds of the finished jobs of an experiment by stage, from their manifests.

    python -m benchmarks.stages [results/demo]

Seconds are those that each job took when it last ran, on the machine that its manifest names. Jobs that ran side by
side add up to more than the run took.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from pipeline.stores import manifest


def seconds_by_stage(results: Path) -> dict[str, list[float]]:
    """The seconds of all jobs whose manifests lie below ``results``, by stage; the longest stage first."""
    found: dict[str, list[float]] = defaultdict(list)
    for path in results.rglob(manifest.NAME):
        record = manifest.read(path.parent)
        if record is not None:
            found[record["stage"].split()[0]].append(float(record["seconds"]))
    return dict(sorted(found.items(), key=lambda item: -sum(item[1])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=Path("results/demo"))
    options = parser.parse_args()
    found = seconds_by_stage(options.results)
    if not found:
        parser.exit(1, f"{options.results}: no finished job; run the experiment first\n")
    for stage, seconds in found.items():
        print(f"{stage:<16} {len(seconds):4d} jobs {sum(seconds):9.1f} s, {sum(seconds) / len(seconds):7.1f} s a job")
    print(f"{'all':<16} {sum(map(len, found.values())):4d} jobs {sum(map(sum, found.values())):9.1f} s")


if __name__ == "__main__":
    main()
