"""From maps to pseudo labels."""


rule pseudo_labels:
    input:
        index="<results>/index/index.json",
        maps=lambda w: f"<results>/{P.pseudo_labels[w.name].source}/maps.h5",
        saliency="<results>/saliency/maps.h5",
    output:
        labels="<results>/pseudo_labels/{name}/labels.h5",
        manifest="<results>/pseudo_labels/{name}/manifest.json",
    log:
        "<logs>/pseudo_labels/{name}.log",
    conda:
        "../environment.yml"
    threads: PLAN.threads
    params:
        options=PLAN.options,
    shell:
        "python -m stages.pseudo_labels {wildcards.name} --workers {threads} {params.options} 2>&1 | tee {log}"


rule mixture:
    input:
        index="<results>/index/index.json",
        labels=lambda w: f"<results>/{P.mixtures[w.name].labels}/labels.h5",
        ground_truth="<results>/ground_truth/labels.h5",
    output:
        labels="<results>/mixtures/{name}/labels.h5",
        manifest="<results>/mixtures/{name}/manifest.json",
    log:
        "<logs>/mixtures/{name}.log",
    conda:
        "../environment.yml"
    params:
        options=PLAN.options,
    shell:
        "python -m stages.mixture {wildcards.name} {params.options} 2>&1 | tee {log}"
