"""How many slots and cores a job takes, and how Snakemake counts them."""

import dataclasses
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import cards
from pipeline.config.params import load
from pipeline.config.stage_table import STAGES
from pipeline.workflow.graph import Graph
from pipeline.workflow.snakemake import Plan
from tests import project
from tests.nvidia_smi import TWO

pytestmark = pytest.mark.usefixtures("machine")


class TestSlots:
    def test_the_rule(self) -> None:
        """The demo's trainings need one slot; a batch of 16 crops of 321 pixels in one backbone, two."""
        demo = load([project.ROOT / "params.yaml"])
        sections = (demo.classifiers, demo.refinements, demo.affinities, demo.segmentations, demo.one_step)
        blocks = [block for section in sections for block in section.values()]
        assert {cards.slots_needed(block, demo.dataset.demo) for block in blocks} == {1}
        block = demo.segmentations["cam"]
        large = dataclasses.replace(
            block,
            training=dataclasses.replace(block.training, batch_size=16),
            augmentation=dataclasses.replace(block.augmentation, crop=321, scale=(0.5, 2.0)),
        )
        assert cards.slots_needed(large, None) == 2
        assert cards.slots_needed(demo.localizations["cam"], None) == 1

    def test_snakemake_counts_slots(self) -> None:
        graph = Graph(load([project.ROOT / "params.yaml", project.ROOT / "profiles/voc2012.yaml"]))
        stage, wildcards = STAGES["segmentation"], SimpleNamespace(name="oaa")
        plan = Plan(graph, [], gpu_slots=10, has_gpu=True)
        slots = plan.slots(stage)(wildcards)
        assert slots == cards.slots_needed(graph.find("segmentation", "oaa").block, None) > 1
        assert plan.slots(STAGES["evaluation"]) == 0
        command = plan.command(stage)(wildcards, 8, SimpleNamespace(gpu=slots))
        assert re.search(rf" --slots {slots}\b", command)
        limited = Plan(graph, [], gpu_slots=1, has_gpu=True)
        assert limited.slots(stage)(wildcards) == 1

    @pytest.mark.parametrize(("memory", "jobs"), [(15360, 8), (24564, 8), (81559, 16)])
    def test_a_job_reserves_no_more_slots_than_a_card_has(self, machine: Any, memory: int, jobs: int) -> None:
        """Eight cards run eight jobs at least, also where each job needs more than a card has."""
        listed = "".join(f"GPU {number}: Tesla T4 (UUID: GPU-{number})\n" for number in range(8))
        machine(listed, *[memory] * 8)
        graph = Graph(load([project.ROOT / "params.yaml", project.ROOT / "profiles/voc2012.yaml"]))
        plan = Plan(graph, [], gpu_slots=cards.total_slots(), cores=64, has_gpu=True)
        slots = plan.slots(STAGES["segmentation"])(SimpleNamespace(name="oaa"))
        assert plan.gpu_slots // slots >= jobs

    def test_a_job_of_several_processes_takes_a_card_for_each(self) -> None:
        """Of each card the slots for its part of the batch; the same with inference; on a cluster, whole cards."""
        training = {"segmentations": {"oaa": {"training": {"processes": 5}}}}
        files = [project.ROOT / "params.yaml", project.ROOT / "profiles/voc2012.yaml"]
        whole, graph = Graph(load(files)), Graph(load(files, training))
        stage, wildcards = STAGES["segmentation"], SimpleNamespace(name="oaa")
        each = cards.slots_needed(graph.find("segmentation", "oaa").block, None)
        assert 1 <= each < cards.slots_needed(whole.find("segmentation", "oaa").block, None)
        plan = Plan(graph, [], gpu_slots=40, has_gpu=True)
        slots = plan.slots(stage)(wildcards)
        assert slots == 5 * each
        command = plan.command(stage)(wildcards, 8, SimpleNamespace(gpu=slots))
        assert re.search(rf" --slots {each}\b", command)
        assert plan.slots(STAGES["prediction"])(wildcards) == 5
        cluster = Plan(graph, [], has_gpu=True)
        assert cluster.slots(stage)(wildcards) == 5
        assert cluster.slots(stage)(SimpleNamespace(name="cam")) == 1
        assert cluster.slots(STAGES["localization"]) == 1
        plain = Plan(graph, [])
        assert plain.threads(stage)(wildcards) == 5
        assert plain.threads(stage)(SimpleNamespace(name="cam")) == plain.threads(STAGES["localization"]) == 1

    def test_no_job_waits_for_more_cores_than_another_one_frees(self) -> None:
        """Snakemake reserves no cores. The labels of a single row need not wait, hence they get all."""
        every = Graph(load([project.ROOT / "params.yaml"]))
        single = Graph(load([project.ROOT / "params.yaml"], {"rows": ["oaa"], "method": "oaa", "first": []}))
        labels = STAGES["pseudo_labels"]
        assert labels.threads == 16
        for graph, expected in ((every, 2), (single, 16)):
            plan = Plan(graph, [], 17, 16, has_gpu=True)
            assert plan.threads(STAGES["prediction"])(SimpleNamespace(name="oaa")) == 2
            assert plan.threads(labels) == expected
        assert {Plan(every, [], cores=16).threads(stage) for stage in STAGES.values()} == {1}

    def test_jobs_share_the_cores_as_they_share_the_slots(self) -> None:
        """A job has two cores at least, 8 for each process at most, and on a cluster always as many."""
        training = {"segmentations": {"oaa_plus": {"training": {"processes": 2}}}}
        files = [project.ROOT / "params.yaml", project.ROOT / "profiles/voc2012.yaml"]
        graph = Graph(load(files, training))

        def cores_of(name: str, slots: int, cores: int, stage: str = "segmentation") -> tuple[int, int]:
            plan = Plan(graph, [], slots, cores, has_gpu=True)
            wildcards = SimpleNamespace(name=name)
            return plan.slots(STAGES[stage])(wildcards), plan.threads(STAGES[stage])(wildcards)

        needed = cards.slots_needed(graph.find("segmentation", "oaa").block, None)
        assert 2 <= needed <= 4
        assert cores_of("oaa", 17, 34) == (needed, 2 * needed)
        assert cores_of("oaa", 17, 16) == (needed, max(2, 16 * needed // 17))
        assert cores_of("cam", 17, 16, "localization") == (1, 2)
        assert cores_of("oaa", 1, 16) == (1, 8)
        assert cores_of("oaa_plus", 8, 64)[1] == 16
        assert cores_of("oaa_plus", 34, 4)[1] == 4
        cluster = Plan(graph, [], has_gpu=True)
        threads = cluster.threads(STAGES["segmentation"])
        assert [threads(SimpleNamespace(name=name)) for name in ("oaa", "oaa_plus")] == [8, 16]
        assert cluster.threads(STAGES["localization"]) == 8

    @pytest.mark.slow
    def test_snakemake_plans_them(self, machine: Any, tmp_path: Path) -> None:
        """Of a card with 17 slots each job takes one, and its part of the cores; ``--resources`` offers fewer slots."""
        machine(TWO.splitlines()[0] + "\n", 143771)
        folder = project.copy(tmp_path / "project", git=False)
        arguments = ("snakemake", "--dry-run", "--printshellcmds", "--cores", "68")
        shown = project.run(folder, *arguments)
        assert "stages.classifier base --threads 1 --workers 3 --slots 1 " in shown
        assert "stages.localization cam --threads 4 --slots 1 " in shown
        assert "stages.prediction cam --threads 4 --workers 4 --slots 1 " in shown
        shown = project.run(folder, *arguments, "--resources", "gpu=1")
        assert "stages.classifier base --threads 2 --workers 6 --slots 1 " in shown

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("variable", "resources", "line"),
        [
            ("0", (), "WSSS_GPU_SLOTS=0: must be a number of slots per GPU, at least 1"),
            ("2", ("--resources", "gpu=0"), "--resources gpu=0: must be at least 1; to compute on the CPU, set"),
        ],
    )
    def test_no_slots_are_refused(
        self, machine: Any, monkeypatch: pytest.MonkeyPatch, variable: str, resources: tuple[str, ...], line: str
    ) -> None:
        machine(TWO, 81559, 81559)
        monkeypatch.setenv(cards.VARIABLE, variable)
        done = subprocess.run(
            ["snakemake", "--dry-run", "--cores", "2", *resources], cwd=project.ROOT, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert f"error: {line}" in done.stderr
        assert "Traceback" not in done.stderr

    @pytest.mark.slow
    def test_the_cores_of_the_submitting_machine_do_not_limit_the_jobs_of_a_cluster(self, tmp_path: Path) -> None:
        """They limited each job to as many threads, hence SLURM gave it as few cores."""
        folder = project.copy(tmp_path / "project", git=False)
        config = folder / "profiles/default/config.yaml"
        config.write_text(config.read_text().replace("cores: all", "cores: 1"))
        training = '{"oaa": {"training": {"processes": 2}}}'
        shown = project.run(
            folder, "snakemake", "--dry-run", "--printshellcmds", "--profile", "profiles/slurm",
            "--config", f"segmentations={training}",
        )  # fmt: skip
        assert "stages.classifier base --threads 2 --workers 6 " in shown
        assert "stages.pseudo_labels oaa --workers 16 " in shown
        assert "stages.segmentation oaa --threads 4 --workers 12 " in shown

    def test_a_job_on_a_cluster_takes_a_card(self) -> None:
        plan = Plan(Graph(load([project.ROOT / "params.yaml"])), [], has_gpu=True)
        assert {plan.slots(stage) for stage in plan.stages if stage.gpu} == {1}
        assert "--slots" not in plan.command(STAGES["walk"])(SimpleNamespace(name="cam_irn"), 8, SimpleNamespace(gpu=1))
