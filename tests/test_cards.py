"""Which GPU a job takes, and how jobs share it, with a stand-in for nvidia-smi and for torch.cuda."""

import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import collaboration, cuda
from pipeline import cards
from pipeline.errors import PipelineError
from pipeline.training import settings
from tests import project
from tests.nvidia_smi import MIG, TWO, choose

pytestmark = pytest.mark.usefixtures("machine")


def _waits(seconds: float) -> None:
    raise AssertionError("the process waits for slots")


def uuids() -> list[str]:
    cards.visible.cache_clear()
    return [card.uuid for card in cards.visible()]


class TestVisible:
    @pytest.mark.parametrize(
        ("variable", "expected"),
        [
            (None, [1, 2]),
            ("0,1", [1, 2]),
            ("1", [2]),
            ("1,0", [2, 1]),
            ("GPU-12222222-bbbb", [2]),
            ("GPU-11", [1]),  # a prefix suffices
            ("GPU-1", []),  # unless it is ambiguous
            ("0,7,1", [1]),  # the rest after an invalid entry is ignored
            ("", []),
            ("-1", []),
            ("0,0", [1]),
        ],
    )
    def test_cuda_visible_devices_is_obeyed(
        self, machine: Any, monkeypatch: pytest.MonkeyPatch, variable: str | None, expected: list[int]
    ) -> None:
        machine(TWO, 81559, 81559)
        if variable is not None:
            monkeypatch.setenv(cards.VISIBLE, variable)
        assert uuids() == [{1: "GPU-11111111-aaaa", 2: "GPU-12222222-bbbb"}[number] for number in expected]

    @pytest.mark.parametrize(
        ("variable", "expected"),
        [
            (None, ["MIG-aaaa", "MIG-bbbb", "GPU-5c891111"]),
            ("MIG-bbbb", ["MIG-bbbb"]),
            ("0", ["MIG-aaaa", "MIG-bbbb"]),
            ("1,MIG-aaaa", ["GPU-5c891111", "MIG-aaaa"]),
        ],
    )
    def test_mig_instances_replace_their_card(
        self, machine: Any, monkeypatch: pytest.MonkeyPatch, variable: str | None, expected: list[str]
    ) -> None:
        machine(MIG, 40960, 40960)
        if variable is not None:
            monkeypatch.setenv(cards.VISIBLE, variable)
        assert uuids() == expected

    def test_slots_follow_the_memory(self, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        machine(TWO, 81559, 24564)
        assert [card.slots for card in cards.visible()] == [10, 3]
        assert cards.total_slots() == 13
        machine(MIG, 40960, 40960)
        assert [card.slots for card in cards.visible()] == [2, 1, 5]
        machine(TWO, "[N/A]", "[N/A]")
        assert cards.total_slots() == 2
        monkeypatch.setenv(cards.VARIABLE, "4")
        assert cards.total_slots() == 8
        monkeypatch.setenv(cards.VARIABLE, "0")
        with pytest.raises(PipelineError, match="WSSS_GPU_SLOTS=0: must be a number of slots per GPU, at least 1"):
            cards.total_slots()

    def test_a_machine_without_the_program_has_none(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        cards.visible.cache_clear()
        assert cards.visible() == ()


class TestChoose:
    def test_jobs_spread_over_cards_and_then_share_them(
        self, machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        machine(TWO, 81559, 81559)
        monkeypatch.setenv(cards.VARIABLE, "2")
        first, second = "GPU-11111111-aaaa", "GPU-12222222-bbbb"
        assert [choose() for _ in range(4)] == [("cuda:0", uuid) for uuid in (first, second, first, second)]
        shown = capsys.readouterr().out.splitlines()
        assert shown[0] == f"device: NVIDIA H100 80GB HBM3 ({first}), slot 0 of 2"
        assert shown[3] == f"device: NVIDIA H100 80GB HBM3 ({second}), slot 1 of 2"

    def test_a_job_takes_all_its_slots_on_one_card(self, machine: Any, capsys: pytest.CaptureFixture[str]) -> None:
        machine(TWO, 24564, 81559)
        assert choose(needed=8)[1] == "GPU-12222222-bbbb"
        assert choose(needed=3)[1] == "GPU-11111111-aaaa"
        assert capsys.readouterr().out.splitlines()[1].endswith("slots 0, 1, 2 of 3")

    def test_a_card_with_fewer_slots_is_taken_whole(self, machine: Any, capsys: pytest.CaptureFixture[str]) -> None:
        machine(TWO.splitlines()[0] + "\n", 24564)
        choose(needed=5)
        assert capsys.readouterr().out.endswith("slots 0, 1, 2 of 3\n")

    @pytest.mark.parametrize(
        ("listed", "memories", "large"),
        [(TWO, (12288, 40960), "GPU-12222222-bbbb"), (MIG.partition("GPU 1")[0], (40960,), "MIG-aaaa")],
    )
    def test_a_job_waits_for_a_large_card_rather_than_take_a_small_one(
        self, machine: Any, monkeypatch: pytest.MonkeyPatch, listed: str, memories: tuple[int, ...], large: str
    ) -> None:
        machine(listed, *memories)
        assert choose(needed=2)[1] == large
        slots = max(card.slots for card in cards.visible())
        assert slots >= 2
        for _ in range(slots // 2 - 1):
            assert choose(needed=2)[1] == large
        monkeypatch.setattr(cards, "time", SimpleNamespace(sleep=_waits))
        with pytest.raises(AssertionError, match="waits for slots"):
            choose(needed=2)
        assert choose(needed=1)[1] != large  # a small job takes the small card

    def test_of_different_cards_each_gives_what_it_has(self, machine: Any) -> None:
        """Two processes that need 4 slots each: the smaller card is taken whole, and the larger one not."""
        machine(TWO, 24564, 81559)
        assert cards.reserve("cuda", 4, 2) == ["GPU-12222222-bbbb", "GPU-11111111-aaaa"]
        assert len(cards._held) == 3 + 4

    def test_a_job_waits_until_enough_slots_are_free(
        self, machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        machine(TWO.splitlines()[0] + "\n", 24564)
        choose(needed=2)
        release = threading.Timer(0.2, lambda: [cards._held.pop(0).close() for _ in range(2)])
        release.start()
        choose(needed=2)
        release.join()
        shown = capsys.readouterr().out.splitlines()
        assert shown[1].startswith("waiting: no GPU has 2 free slots")
        # A look between the two releases finds other slots than one after both.
        assert re.search(r"slots (0, 1|0, 2|1, 2) of 3$", shown[2])

    def test_slots_of_a_killed_process_are_free(self, machine: Any, tmp_path: Path) -> None:
        machine(TWO.splitlines()[0] + "\n", 8100)
        code = "import tempfile; tempfile.tempdir = {!r}; from pipeline import cards; import torch; "
        code += "torch.version.cuda = '13'; cards.choose('auto', 1); import os; os.kill(os.getpid(), 9)"
        done = subprocess.run([sys.executable, "-c", code.format(str(tmp_path))], cwd=project.ROOT)
        assert done.returncode == -9
        assert choose()[1] == "GPU-11111111-aaaa"

    def test_users_share_a_card(self, machine: Any, capsys: pytest.CaptureFixture[str]) -> None:
        """Whoever comes first creates files that all can lock, whatever their umask."""
        machine(TWO.splitlines()[0] + "\n", 24564)
        with tempfile.TemporaryDirectory(dir="/tmp") as shared, pytest.MonkeyPatch.context() as patch:
            os.chmod(shared, 0o777)
            patch.setattr("tempfile.tempdir", shared)
            before = os.umask(0o077)
            try:
                choose(needed=2)
            finally:
                os.umask(before)
            assert stat.S_IMODE(Path(shared, cards.FOLDER).stat().st_mode) == 0o1777
            names = ("choosing", "GPU-11111111-aaaa.0", "GPU-11111111-aaaa.2")
            modes = [stat.S_IMODE(Path(shared, cards.FOLDER, name).stat().st_mode) for name in names]
            assert modes == [0o666] * 3
            if os.getuid() == 0:
                assert self.free_of_another_user(Path(shared, cards.FOLDER)) == 1

    @staticmethod
    def free_of_another_user(folder: Path) -> int:
        """The number of slots of the first card that a process of another user finds free."""
        if (child := os.fork()) == 0:
            try:
                os.setuid(65534)
                os._exit(len(cards._lock_free(folder, cards.visible()[0])))
            finally:
                os._exit(99)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def test_a_folder_that_is_closed_is_named(self, machine: Any, tmp_path: Path) -> None:
        machine(TWO.splitlines()[0] + "\n", 24564)
        (tmp_path / cards.FOLDER).write_text("")
        with pytest.raises(
            PipelineError, match=r"wsss-cards/choosing: Not a directory; remove \S*/wsss-cards, by which"
        ):
            choose()

    def test_a_named_card_is_taken_and_locked(self, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        machine(TWO, 81559, 81559)
        assert choose("cuda:1") == ("cuda:0", "GPU-12222222-bbbb")
        assert choose("auto")[1] == "GPU-11111111-aaaa"  # which has more free slots
        with pytest.raises(PipelineError, match="--device cuda:2: the GPUs are cuda:0 to cuda:1"):
            choose("cuda:2")

    def test_a_process_takes_slots_once(self, machine: Any) -> None:
        machine(TWO.splitlines()[0] + "\n", 8100)
        cards._chosen.clear()
        try:
            assert cards.choose("auto", 1) == cards.choose("auto", 1) == "cuda:0"
        finally:
            os.environ.pop(cards.VISIBLE)

    @pytest.mark.parametrize("requested", ["auto", "cuda", "cuda:0"])
    def test_the_card_that_a_process_has_is_taken_once_under_any_name(
        self, machine: Any, monkeypatch: pytest.MonkeyPatch, requested: str
    ) -> None:
        machine(TWO.splitlines()[0] + "\n", 15360)  # a T4: a single slot
        monkeypatch.setattr(cards, "time", SimpleNamespace(sleep=_waits))
        monkeypatch.setenv(cards.VISIBLE, "0")
        name = cards.choose(requested, 1)
        assert cards.choose(name, 1) == cards.choose(requested, 1) == name == "cuda:0"

    def test_released_slots_are_free_for_a_child(
        self, machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        machine(TWO.splitlines()[0] + "\n", 15360)
        monkeypatch.setenv(cards.VISIBLE, "0")
        device = cards.choose("cuda", 1)
        code = f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}; from pipeline import cards; import torch; "
        code += f"torch.version.cuda = '13'; print(cards.choose({device!r}, 1))"
        child = subprocess.Popen(
            [sys.executable, "-uc", code], cwd=project.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline().startswith("waiting: no GPU has 1 free slots")
        cards.release()
        assert child.communicate()[0].endswith("\ncuda:0\n")
        monkeypatch.setattr(cards, "time", SimpleNamespace(sleep=_waits))
        assert cards.choose(device, 1) == "cuda:0"  # takes a slot again

    def test_the_benchmark_holds_no_slots_while_it_waits_for_others(
        self, machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def run(command: list[str], **more: Any) -> None:
            held.append(len(cards._held))
            Path(command[command.index("--json") + 1]).write_text("{}")

        machine(TWO.splitlines()[0] + "\n", 15360)
        choose()
        held: list[int] = []
        monkeypatch.setattr("subprocess.run", run)
        cuda.inference(torch.device("cpu"), small=True, folder=tmp_path)
        assert held == [0, 0]

    def test_the_line_that_names_the_gpu_is_no_part_of_a_benchmarks_figures(
        self, machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        machine(TWO.splitlines()[0] + "\n", 15360)
        choose()
        shown = capsys.readouterr().out + '{"seconds": 1.5}\n'
        monkeypatch.setattr("subprocess.run", lambda *_, **__: SimpleNamespace(stdout=shown))
        assert collaboration.turn("sum", "fp32", []) == {"seconds": 1.5}

    def test_without_the_program_torch_lists_the_cards(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("PATH", "")
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        card = {"name": "card", "total_memory": 10 << 30}
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: SimpleNamespace(uuid=number, **card))
        assert [choose() for _ in range(2)] == [("cuda:0", None), ("cuda:1", None)]
        assert capsys.readouterr().out.splitlines()[1] == "device: card (GPU-1), slot 0 of 1"

    def test_a_torch_for_the_cpu_ignores_cards(self, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        machine(TWO, 81559, 81559)
        monkeypatch.setattr("torch.version.cuda", None)
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        assert choose() == ("cpu", None)
        with pytest.raises(PipelineError, match="--device cuda: this torch sees no CUDA device; use --device cpu"):
            choose("cuda")

    def test_a_card_that_torch_cannot_use_is_named(
        self, machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        machine(TWO, 81559, 81559)
        monkeypatch.setenv(cards.VISIBLE, "0")
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        assert settings.prepare("auto", 1).type == "cpu"
        assert "warning: this torch cannot use the GPU" in capsys.readouterr().out
        with pytest.raises(PipelineError, match="--device cuda: this torch cannot use the GPU; update its driver"):
            settings.prepare("cuda", 1)


class TestSeveral:
    """A job of several processes takes the same number of slots on as many cards, all at once."""

    def test_each_process_has_a_card(self, machine: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        machine(TWO, 81559, 81559)
        assert cards.reserve("auto", 3, 2) == ["GPU-11111111-aaaa", "GPU-12222222-bbbb"]
        printed = capsys.readouterr().out.splitlines()
        uuids = ("GPU-11111111-aaaa", "GPU-12222222-bbbb")
        assert printed == [f"device: NVIDIA H100 80GB HBM3 ({uuid}), slots 0, 1, 2 of 10" for uuid in uuids]
        folder = tmp_path / cards.FOLDER
        assert [len(cards._lock_free(folder, card)) for card in cards.visible()] == [7, 7]

    def test_a_process_uses_the_card_that_is_named(self, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        machine(TWO, 81559, 81559)
        monkeypatch.setenv(cards.VISIBLE, "0,1")
        assert cards.adopt("auto", "GPU-12222222-bbbb") == "cuda:0"
        assert os.environ[cards.VISIBLE] == "GPU-12222222-bbbb"
        assert cards.choose("auto", 3) == "cuda:0"

    def test_it_waits_until_both_are_free(self, machine: Any, capsys: pytest.CaptureFixture[str]) -> None:
        machine(TWO, 81559, 81559)
        choose(needed=9)
        first = list(cards._held)
        cards._held.clear()
        threading.Timer(0.3, lambda: [file.close() for file in first]).start()
        assert len(cards.reserve("auto", 9, 2)) == 2
        assert "waiting: fewer than 2 GPUs have 9 free slots" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("listed", "device", "processes", "line"),
        [
            (TWO, "auto", 3, "3 processes need as many GPUs, and there are 2 to choose from (--device auto;"),
            (TWO, "cuda:1", 2, "2 processes need as many GPUs, and there is 1 to choose from (--device cuda:1;"),
            (MIG, "auto", 2, "2 processes need as many GPUs, and there is 1 to choose from (--device auto;"),
        ],
    )
    def test_more_processes_than_cards(self, machine: Any, listed: str, device: str, processes: int, line: str) -> None:
        machine(listed, 40960, 40960)
        for take in (cards.require, lambda *arguments: cards.reserve(arguments[0], 1, arguments[1])):
            with pytest.raises(PipelineError) as caught:
                take(device, processes)
            assert caught.value.lines[0].startswith(f"training.processes: {line}")
        assert not cards._held


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_chosen_card_computes(tmp_path: Path) -> None:
    code = "from pipeline.training.settings import prepare; import torch; d = prepare('auto', 1); "
    code += "print(d, torch.cuda.device_count(), float(torch.ones(3, device=d).sum()))"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PATH": os.environ["PATH"].split(os.pathsep, 1)[1]}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project.ROOT, env=environment, capture_output=True, text=True
    )
    assert re.fullmatch(r"device: .+, slot 0 of \d+\ncuda:0 1 3.0\n", done.stdout), done.stdout + done.stderr
