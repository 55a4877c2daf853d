"""The numbers after every stage, and the pages that a person looks at."""

SCORED = {  # of any other section: labels
    "classifiers": ["maps.h5", "snapshots.h5"],
    "localizations": ["maps.h5"],
    "walks": ["maps.h5"],
}


rule evaluation:
    input:
        index="<results>/index/index.json",
        ground_truth="<results>/ground_truth/labels.h5",
        scored=lambda w: [f"<results>/{w.section}/{w.name}/{file}" for file in SCORED.get(w.section, ["labels.h5"])],
    output:
        scores="<results>/evaluation/{section}/{name}/scores.json",
        manifest="<results>/evaluation/{section}/{name}/manifest.json",
    log:
        "<logs>/evaluation/{section}/{name}.log",
    conda:
        "../environment.yml"
    params:
        options=PLAN.options,
    shell:
        "python -m stages.evaluation {wildcards.section}/{wildcards.name} {params.options} 2>&1 | tee {log}"


MAPS = PLAN.blocks("classifiers", "localizations", "walks")
LABELS = PLAN.blocks("pseudo_labels", "mixtures", "predictions")
TRAINED = PLAN.blocks("classifiers", "refinements", "affinities", "segmentations", "one_step")


rule report:
    input:
        index="<results>/index/index.json",
        ground_truth="<results>/ground_truth/labels.h5",
        saliency="<results>/saliency/maps.h5",
        maps=collect("<results>/{block}/maps.h5", block=MAPS),
        labels=collect("<results>/{block}/labels.h5", block=LABELS),
        scores=collect("<results>/evaluation/{block}/scores.json", block=MAPS + LABELS),
        features=collect("<results>/features/{name}/features.h5", name=P.classifiers),
        layers=collect("<results>/features/{name}/layers.json", name=P.classifiers),
        logs=collect("<results>/{block}/log.json", block=TRAINED),
    output:
        report=report("<results>/report.html", category="Results"),
        table=report("<results>/metrics.json", category="Results"),
        metrics="metrics.json",
        manifest="<results>/manifest.json",
    log:
        "<logs>/report.log",
    conda:
        "../environment.yml"
    params:
        options=PLAN.options,
    shell:
        "python -m stages.report {params.options} 2>&1 | tee {log}"
