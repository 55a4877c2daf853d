"""From image tags to masks: one rule a stage, one job a block of params.yaml, whatever the number of images.

The rules are those of pipeline/config/stage_table.py; the params are read by pipeline/config/params.py. What is up to date is decided
by the manifests beside the outputs (pipeline/workflow/snakemake.py).
"""

from snakemake.utils import min_version

from pipeline.workflow.snakemake import plan

min_version("9.27")

PLAN = plan(workflow)


# Of a job's processes the stage alone acts on Ctrl-C and SIGTERM: its shell waits for it, and tee takes down its last line.
shell.prefix("set -euo pipefail; trap : INT TERM; tee() {{ trap '' INT TERM; exec tee \"$@\"; }}; ")


wildcard_constraints:
    name="[^/]+(/[^/]+)?",


# Every stage, not the report alone: a failed rerun of an early one must not pass for 'nothing to be done'.
rule all:
    input:
        PLAN.targets,


for stage in PLAN.stages:

    rule:
        name:
            stage.name
        input:
            PLAN.inputs(stage),
        output:
            PLAN.outputs(stage),
        log:
            PLAN.log(stage),
        conda:
            "environment.yml"
        threads: PLAN.threads(stage)
        resources:
            gpu=int(stage.gpu),
        params:
            command=PLAN.command(stage),
        shell:
            "{params.command} 2>&1 | tee {log}"


onsuccess:
    PLAN.record()


onerror:
    PLAN.record()
