#!/bin/bash
# Needs root (it mounts a /dev/shm of 64 MB, Docker's default, for itself alone) and some minutes, so it is no part of the suite.
# From the project's root: bash tests/manual/shared_memory.sh
# A training with crops of 321, batches of 16 and 4 workers must say in one line that there is little room, and end.
set -euo pipefail
test "$(id -u)" = 0 || { echo "error: needs root, to mount a small /dev/shm"; exit 1; }
export PYTHONPATH=$PWD OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
ln -s "$PWD/pipeline" "$PWD/stages" "$work"
cd "$work"
python - <<'PYTHON'
from pathlib import Path

import yaml

from tests.voc_tree import make_tree, minimal_params

params = minimal_params(make_tree(Path("data"), train=96, size=(366, 500)))
training = {"batch_size": 16, "lr": 0.05, "epochs": 1}
params["classifiers"]["base"] = {"backbone": {"name": "small"}, "training": training, "augmentation": {"crop": 321}}
Path("params.yaml").write_text(yaml.safe_dump(params))
PYTHON
python -m stages.index
unshare --mount sh -c 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec timeout 300 "$0" -m stages.classifier base --workers 4' \
    "$(command -v python)" | tee log.txt
grep -q '^classifier base: /dev/shm has 67 MB free, and 4 workers' log.txt
grep -q '^classifier base: done in' log.txt
echo "passed"
