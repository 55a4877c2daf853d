"""The segmentation networks trained on label maps, the one-step networks trained on tags, and the predictions of both."""


rule segmentation:
    input:
        index="<results>/index/index.json",
        labels=lambda w: f"<results>/{P.segmentations[w.name].labels}/labels.h5",
        weights=PLAN.weights("segmentations"),
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


rule one_step:
    input:
        index="<results>/index/index.json",
        weights=PLAN.weights("one_step"),
    output:
        model="<results>/one_step/{name}/model.pt",
        log="<results>/one_step/{name}/log.json",
        manifest="<results>/one_step/{name}/manifest.json",
    log:
        "<logs>/one_step/{name}.log",
    conda:
        "../environment.yml"
    threads: PLAN.threads
    resources:
        gpu=1,
    params:
        options=PLAN.options,
        runtime=PLAN.runtime,
    shell:
        "python -m stages.one_step {wildcards.name} {params.runtime} {params.options} 2>&1 | tee {log}"


rule prediction:
    input:
        index="<results>/index/index.json",
        model=lambda w: f"<results>/{PLAN.network(w)}/model.pt",
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
