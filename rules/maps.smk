"""Networks that learn from tags where objects are, their localization maps and their features."""


rule classifier:
    input:
        index="<results>/index/index.json",
        weights=PLAN.weights("classifiers"),
    output:
        model="<results>/classifiers/{name}/model.pt",
        log="<results>/classifiers/{name}/log.json",
        maps="<results>/classifiers/{name}/maps.h5",
        snapshots="<results>/classifiers/{name}/snapshots.h5",
        manifest="<results>/classifiers/{name}/manifest.json",
    log:
        "<logs>/classifiers/{name}.log",
    conda:
        "../environment.yml"
    threads: PLAN.threads
    resources:
        gpu=1,
    params:
        options=PLAN.options,
        runtime=PLAN.runtime,
    shell:
        "python -m stages.classifier {wildcards.name} {params.runtime} {params.options} 2>&1 | tee {log}"


rule features:
    input:
        index="<results>/index/index.json",
        model="<results>/classifiers/{name}/model.pt",
    output:
        features="<results>/features/{name}/features.h5",
        layers="<results>/features/{name}/layers.json",
        manifest="<results>/features/{name}/manifest.json",
    log:
        "<logs>/features/{name}.log",
    conda:
        "../environment.yml"
    threads: PLAN.threads
    resources:
        gpu=1,
    params:
        options=PLAN.options,
        runtime=PLAN.runtime,
    shell:
        "python -m stages.features {wildcards.name} {params.runtime} {params.options} 2>&1 | tee {log}"


rule refinement:
    input:
        index="<results>/index/index.json",
        maps=lambda w: f"<results>/{P.refinements[w.name].source}/maps.h5",
        weights=PLAN.weights("refinements"),
    output:
        model="<results>/refinements/{name}/model.pt",
        log="<results>/refinements/{name}/log.json",
        manifest="<results>/refinements/{name}/manifest.json",
    log:
        "<logs>/refinements/{name}.log",
    conda:
        "../environment.yml"
    threads: PLAN.threads
    resources:
        gpu=1,
    params:
        options=PLAN.options,
        runtime=PLAN.runtime,
    shell:
        "python -m stages.refinement {wildcards.name} {params.runtime} {params.options} 2>&1 | tee {log}"


rule localization:
    input:
        index="<results>/index/index.json",
        model=lambda w: f"<results>/{P.localizations[w.name].model}/model.pt",
    output:
        maps="<results>/localizations/{name}/maps.h5",
        manifest="<results>/localizations/{name}/manifest.json",
    log:
        "<logs>/localizations/{name}.log",
    conda:
        "../environment.yml"
    threads: PLAN.threads
    resources:
        gpu=1,
    params:
        options=PLAN.options,
        runtime=PLAN.runtime,
    shell:
        "python -m stages.localization {wildcards.name} {params.runtime} {params.options} 2>&1 | tee {log}"
