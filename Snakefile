"""From image tags to masks: one rule a stage, one job a block of params.yaml, whatever the number of images.

What is up to date is decided by the manifests beside the outputs (pipeline/snakemake.py); here stand order, resources
and targets.
"""

from snakemake.utils import min_version

from pipeline.snakemake import plan

min_version("9.27")


configfile: "params.yaml"


PLAN = plan(workflow)
P = PLAN.params


# Of a job's processes the stage alone acts on Ctrl-C and SIGTERM: its shell waits for it, and tee takes down its last line.
shell.prefix("set -euo pipefail; trap : INT TERM; tee() {{ trap '' INT TERM; exec tee \"$@\"; }}; ")


pathvars:
    results=f"results/{P.experiment}",
    logs=f"results/{P.experiment}/logs",


wildcard_constraints:
    section="[^/]+",
    name="[^/]+",


# Every stage, not the report alone: a failed rerun of an early one must not pass for 'nothing to be done'.
rule all:
    input:
        PLAN.targets,


include: "rules/dataset.smk"
include: "rules/maps.smk"
include: "rules/labels.smk"
include: "rules/affinity.smk"
include: "rules/segmentation.smk"
include: "rules/results.smk"


onsuccess:
    PLAN.record()


onerror:
    PLAN.record()
