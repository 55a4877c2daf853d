"""The dataset and what is read from it once: index, masks for the evaluation, saliency maps."""

MADE = P.dataset.demo or P.dataset.download or P.dataset.coco_stuff

if P.dataset.demo:

    rule demo:
        input:
            "stages/demo.py",
        output:
            manifest="<results>/dataset/manifest.json",
        log:
            "<logs>/demo.log",
        conda:
            "../environment.yml"
        params:
            options=PLAN.options,
        shell:
            "python -m stages.demo {params.options} 2>&1 | tee {log}"

elif P.dataset.download:

    rule download:
        input:
            "stages/download.py",
        output:
            manifest="<results>/dataset/manifest.json",
        log:
            "<logs>/download.log",
        conda:
            "../environment.yml"
        params:
            options=PLAN.options,
        shell:
            "python -m stages.download {params.options} 2>&1 | tee {log}"

elif P.dataset.coco_stuff:

    rule coco_stuff:
        input:
            P.dataset.coco_stuff,
        output:
            manifest="<results>/dataset/manifest.json",
        log:
            "<logs>/coco_stuff.log",
        conda:
            "../environment.yml"
        params:
            options=PLAN.options,
        shell:
            "python -m stages.coco_stuff {params.options} 2>&1 | tee {log}"


rule index:
    input:
        dataset="<results>/dataset/manifest.json" if MADE else P.dataset.root,
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
