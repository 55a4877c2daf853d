"""The dataset and what is read from it once: index, masks for the evaluation, saliency maps."""

if P.dataset.makers:

    rule:
        name:
            P.dataset.makers[0]
        input:
            P.dataset.coco_stuff or f"stages/{P.dataset.makers[0]}.py",
        output:
            manifest="<results>/dataset/manifest.json",
        log:
            "<logs>/dataset.log",
        conda:
            "../environment.yml"
        params:
            stage=P.dataset.makers[0],
            options=PLAN.options,
        shell:
            "python -m stages.{params.stage} {params.options} 2>&1 | tee {log}"


rule index:
    input:
        dataset="<results>/dataset/manifest.json" if P.dataset.makers else P.dataset.root,
        extra=P.dataset.extra or [],
    output:
        index="<results>/index/index.json",
        manifest="<results>/index/manifest.json",
    log:
        "<logs>/index.log",
    conda:
        "../environment.yml"
    params:
        options=PLAN.options,
    shell:
        "python -m stages.index {params.options} 2>&1 | tee {log}"


rule ground_truth:
    input:
        index="<results>/index/index.json",
    output:
        labels="<results>/ground_truth/labels.h5",
        manifest="<results>/ground_truth/manifest.json",
    log:
        "<logs>/ground_truth.log",
    conda:
        "../environment.yml"
    params:
        options=PLAN.options,
    shell:
        "python -m stages.ground_truth {params.options} 2>&1 | tee {log}"


rule saliency:
    input:
        index="<results>/index/index.json",
        store=P.saliency.path if P.saliency.kind == "store" else [],
    output:
        maps="<results>/saliency/maps.h5",
        manifest="<results>/saliency/manifest.json",
    log:
        "<logs>/saliency.log",
    conda:
        "../environment.yml"
    threads: 2
    params:
        options=PLAN.options,
    shell:
        "python -m stages.saliency --workers {threads} {params.options} 2>&1 | tee {log}"
