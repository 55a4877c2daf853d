"""Inter-pixel affinities learned from labels, and maps spread along them."""


rule affinity:
    input:
        index="<results>/index/index.json",
        labels=lambda w: f"<results>/{P.affinities[w.name].labels}/labels.h5",
        weights=PLAN.weights("affinities"),
    output:
        model="<results>/affinities/{name}/model.pt",
        log="<results>/affinities/{name}/log.json",
        manifest="<results>/affinities/{name}/manifest.json",
    log:
        "<logs>/affinities/{name}.log",
    conda:
        "../environment.yml"
    threads: PLAN.threads
    resources:
        gpu=1,
    params:
        options=PLAN.options,
        runtime=PLAN.runtime,
    shell:
        "python -m stages.affinity {wildcards.name} {params.runtime} {params.options} 2>&1 | tee {log}"


rule walk:
    input:
        index="<results>/index/index.json",
        model=lambda w: f"<results>/{P.walks[w.name].affinity}/model.pt",
        maps=lambda w: f"<results>/{P.walks[w.name].maps}/maps.h5",
    output:
        maps="<results>/walks/{name}/maps.h5",
        manifest="<results>/walks/{name}/manifest.json",
    log:
        "<logs>/walks/{name}.log",
    conda:
        "../environment.yml"
    threads: PLAN.threads
    resources:
        gpu=1,
    params:
        options=PLAN.options,
        runtime=PLAN.runtime,
    shell:
        "python -m stages.walk {wildcards.name} {params.runtime} {params.options} 2>&1 | tee {log}"
