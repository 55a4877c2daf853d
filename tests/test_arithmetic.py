"""The record of the arithmetic that results were computed in, and the number of threads that all front ends share."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import arithmetic, cards
from pipeline.config.params import load
from pipeline.config.stage_table import STAGES
from pipeline.runtime import Runtime
from pipeline.stores import manifest
from pipeline.stores.blocks import Row, write_blocks
from pipeline.stores.raster import RasterStore, RasterWriter
from pipeline.training import settings
from pipeline.training.settings import autocast, describe, has_bf16, learning_rate
from pipeline.workflow import dvc
from pipeline.workflow.graph import Graph
from pipeline.workflow.snakemake import Plan
from pipeline.workflow.stage import run
from tests import project as copies
from tests.test_blocks import ITEMS, Item
from tests.test_kill import make_inputs, project  # noqa: F401

CPU = torch.device("cpu")


class TestDescription:
    @pytest.mark.parametrize(
        ("instructions", "bf16", "threads", "expected"),
        [
            ([], False, 1, "fp32 on CPU (AVX2), 1 thread"),
            ([], True, 2, "bf16 on CPU (AVX2), 2 threads"),  # emulated
            (["AVX512_BF16"], False, 1, "fp32 on CPU (AVX2), 1 thread"),
            (["AVX512_BF16"], True, 1, "bf16 on CPU (AVX512_BF16), 1 thread"),
            (["AMX_BF16", "AVX512_BF16"], True, 1, "bf16 on CPU (AMX_BF16), 1 thread"),
        ],
    )
    def test_it_names_precision_instructions_and_threads(
        self, instructions: list[str], bf16: bool, threads: int, expected: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(settings, "_bf16_instructions", lambda: instructions)
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
        torch.set_num_threads(threads)
        assert describe(CPU, bf16) == expected

    @pytest.mark.parametrize(
        ("capability", "bf16", "expected"),
        [((8, 0), True, "bf16"), ((8, 0), False, "fp32 (convolutions in TF32)"), ((7, 5), False, "fp32")],
    )
    def test_a_gpu_has_no_threads_and_may_round_to_tf32(
        self, capability: tuple[int, int], bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA X")
        assert describe(torch.device("cuda:0"), bf16) == f"{expected} on NVIDIA X"

    def test_a_processor_with_fewer_instructions_is_another(self) -> None:
        """torch is told to use AVX2 alone, as on an older processor."""
        if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
            pytest.skip("this processor has no AVX2")
        code = (
            "import torch; from pipeline.training.settings import describe; print(describe(torch.device('cpu'), False))"
        )
        told = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=told, stdout=subprocess.PIPE, text=True, check=True)
        assert done.stdout == "fp32 on CPU (AVX2), 1 thread\n"

    def test_every_autocast_is_recorded(self) -> None:
        with arithmetic.recording():
            for precision in ("fp32", "bf16", "fp32"):
                autocast(CPU, precision)
            assert arithmetic.used() == [describe(CPU, False), describe(CPU, True)]
            with arithmetic.recording():
                autocast(CPU, "auto")
                assert arithmetic.used() == [describe(CPU, has_bf16(CPU))]
            assert len(arithmetic.used()) == 2
        assert arithmetic.used() == []


class TestStages:
    def start(self, stage: str, name: str, *options: str) -> None:
        run(stage, import_module(f"stages.{stage}").main, [name, "--device", "cpu", *options])

    @pytest.mark.parametrize(("stage", "name"), [("classifier", "base"), ("segmentation", "cam"), ("one_step", "agen")])
    def test_a_training_that_goes_on_with_more_threads_says_so(
        self,
        project: Path,  # noqa: F811
        stage: str,
        name: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def stopping(block: Any, step: int, *lengths: int) -> float:
            if step == 5:
                raise KeyboardInterrupt
            return learning_rate(block, step, *lengths)

        section = {"classifier": "classifiers", "segmentation": "segmentations"}.get(stage, stage)
        short = {section: {name: {"training": {"epochs": 2}}}}
        options = ["--set", json.dumps(short), "--checkpoint-every", "0"]
        monkeypatch.setattr("pipeline.training.loop.learning_rate", stopping)
        with pytest.raises(KeyboardInterrupt):
            self.start(stage, name, "--threads", "1", *options)
        monkeypatch.setattr("pipeline.training.loop.learning_rate", learning_rate)
        capsys.readouterr()
        self.start(stage, name, "--threads", "2", *options)
        kinds = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            kinds.append(describe(CPU, has_bf16(CPU)))
        (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        assert note == f"note: {stage} {name}: goes on in {kinds[1]}, after steps in {kinds[0]}"
        job = Graph(load([Path("params.yaml")], short)).find(stage, name)
        record = manifest.read(job.folder)
        assert record is not None
        assert record["arithmetic"] == kinds
        assert json.loads(job.outputs["log"].read_text())["arithmetic"] == kinds
        if stage == "classifier":
            assert RasterStore(job.outputs["maps"]).arithmetic == kinds

    def test_inference_and_its_scores_tell_theirs_and_numpy_alone_has_none(self, project: Path) -> None:  # noqa: F811
        make_inputs("localization")
        short = '{"classifiers": {"drs": {"training": {"epochs": 2}}}}'
        self.start("localization", "drs", "--set", short, "--threads", "2")
        self.start("evaluation", "localizations/drs", "--set", short)
        torch.set_num_threads(2)
        kind = describe(CPU, has_bf16(CPU))
        graph = Graph(load([Path("params.yaml")], json.loads(short)))
        localization, evaluation = graph.find("localization", "drs"), graph.find("evaluation", "localizations/drs")
        assert RasterStore(localization.outputs["maps"]).arithmetic == [kind]
        assert json.loads(evaluation.outputs["scores"].read_text())["arithmetic"] == [kind]
        records = [manifest.read(job.folder) for job in (localization, evaluation, graph.find("ground_truth"))]
        assert [record and record["arithmetic"] for record in records] == [[kind], [], []]


@pytest.mark.parametrize("kinds", [("A", "A"), ("A", "B")])
def test_blocks_computed_before_an_interruption_keep_their_arithmetic(
    tmp_path: Path, kinds: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    def write(kind: str, dies_at: str | None) -> Path:
        def compute(block: Sequence[Item]) -> Iterator[Row]:
            for item in block:
                if item.id == dies_at:
                    raise KeyboardInterrupt
                arithmetic.note([kind])
                yield item.id, 1, np.zeros((2, 2), np.uint8)

        path = tmp_path / "maps.h5"
        with arithmetic.recording(), RasterWriter(path, "maps") as writer:
            write_blocks(ITEMS, compute, writer, tmp_path / "parts", size=3)
        return path

    with pytest.raises(KeyboardInterrupt):
        write(kinds[0], "image7")
    store = RasterStore(write(kinds[1], None))
    assert store.arithmetic == sorted(set(kinds))
    assert capsys.readouterr().out == ("note: resumed in B after blocks in A\n" if kinds[1] == "B" else "")


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("cores", [1, 2, 16])
def test_snakemake_dvc_and_a_start_by_hand_use_the_same_threads_and_workers(
    number: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training's bytes on a CPU depend on it. Snakemake caps the threads of a rule at its cores, by default all."""
    monkeypatch.setattr(cards, "visible", lambda: (cards.Card("H100", "GPU-0", 81559),) * number)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.chdir(copies.ROOT)
    commands: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda _, command: commands.append(command))
    monkeypatch.setattr(dvc, "is_fresh", lambda *_: False)
    by_hand: list[Runtime] = []
    monkeypatch.setattr("pipeline.workflow.stage.execute", lambda job, work, options, _: by_hand.append(options))
    graph = Graph(load([Path("params.yaml")]))
    plan = Plan(graph, [], has_gpu=bool(number))
    jobs = {job.stage: job for job in graph.jobs if STAGES[job.stage].gpu}
    assert {"classifier", "segmentation", "prediction"} <= jobs.keys()
    for stage, job in jobs.items():
        name = job.name
        threads = min(cores, plan.threads(STAGES[stage]))
        snakemake = plan.command(STAGES[stage])(SimpleNamespace(name=name), threads, None)
        dvc.run(dvc.name_of(job))
        run(stage, lambda _: None, [name])
        assert commands[-1][1:] == snakemake.split()[1:]
        assert number or re.search(rf"--threads {threads}\b", snakemake)
        started = by_hand[-1]
        assert f"--threads {started.threads}" in snakemake
        assert f"--workers {started.workers}" in snakemake or (not started.workers and "--workers" not in snakemake)
        run(stage, lambda _: None, [name, "--workers", "0", "--threads", "5"])
        assert (by_hand[-1].threads, by_hand[-1].workers) == (5, 0)
