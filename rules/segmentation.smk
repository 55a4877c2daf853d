"""The segmentation networks trained on label maps, and their predictions."""


rule segmentation:
    input:
        index="<results>/index/index.json",
        labels=lambda w: f"<results>/{P.segmentations[w.name].labels}/labels.h5",
    output:
        model="<results>/segmentations/{name}/model.pt",
        log="<results>/segmentations/{name}/log.json",
        manifest="<results>/segmentations/{name}/manifest.json",
    log:
        "<logs>/segmentations/{name}.log",
    conda:
        "../environment.yml"
    threads: PLAN.threads
    resources:
        gpu=1,
    params:
        options=PLAN.options,
        runtime=PLAN.runtime,
    shell:
        "python -m stages.segmentation {wildcards.name} {params.runtime} {params.options} 2>&1 | tee {log}"


rule prediction:
    input:
        index="<results>/index/index.json",
        model="<results>/segmentations/{name}/model.pt",
    output:
        labels="<results>/predictions/{name}/labels.h5",
        manifest="<results>/predictions/{name}/manifest.json",
    log:
        "<logs>/predictions/{name}.log",
    conda:
        "../environment.yml"
    threads: PLAN.threads
    resources:
        gpu=1,
    params:
        options=PLAN.options,
    shell:
        "python -m stages.prediction {wildcards.name} --threads {threads} --workers {threads} {params.options}"
        " 2>&1 | tee {log}"
