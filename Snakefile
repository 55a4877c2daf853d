"""The workflow from image tags to masks: one rule per stage, one job per block of params.yaml.

pipeline/config/stage_table.py defines the rules, and pipeline/config/params.py reads the params. The manifests next to
the outputs decide which jobs are up to date (pipeline/workflow/snakemake.py).
"""

from snakemake.utils import min_version

from pipeline.workflow.snakemake import plan

min_version("9.27")

PLAN = plan(workflow)


# Only the stage acts on Ctrl-C and SIGTERM. Its shell waits for it, and tee records its last line.
shell.prefix("set -euo pipefail; trap : INT TERM; tee() {{ trap '' INT TERM; exec tee \"$@\"; }}; ")


wildcard_constraints:
    seed="(seed_[0-9]+/)?",
    name="[^/]+(/[^/]+)?",


# All stages, not only the report: otherwise, after a failed rerun of an early stage, there would be 'nothing to be done'.
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
        priority: PLAN.priority(stage)
        conda:
            "environment.yml"
        threads: PLAN.threads(stage)
        resources:
            gpu=PLAN.slots(stage),
        params:
            command=PLAN.command(stage),
        shell:
            "{params.command} 2>&1 | tee {log:q}"


onsuccess:
    PLAN.record()


onerror:
    PLAN.record()
