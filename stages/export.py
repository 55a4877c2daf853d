"""Export the rasters of a store as PNG files: ``python -m stages.export STORE.h5 FOLDER``. Not part of the workflow."""

import argparse
import sys
from pathlib import Path

from pipeline.errors import PipelineError, disk_faults
from pipeline.labels.export import export
from pipeline.stores import manifest
from pipeline.stores.raster import open_foreign


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.export", description=__doc__)
    parser.add_argument(
        "store", type=Path, metavar="STORE.h5", help="label maps are written as palette PNG, other maps as grey PNG"
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    try:
        if not options.store.is_file():
            raise PipelineError(f"{options.store}: no such file; name a store, such as results/demo/saliency/maps.h5")
        manifest.verify(options.store)
        store = open_foreign(options.store)
        with disk_faults(options.folder):
            written = export(store, options.folder)
    except PipelineError as error:
        for line in error.lines:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(1)
    empty = sum(not store.classes(image_id) for image_id in store)
    print(
        f"{options.folder}: {written} PNG files of {len(store.ids)} images"
        + (f"; {empty} images have none" if empty else "")
    )


if __name__ == "__main__":
    main()
