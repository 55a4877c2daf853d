"""The file of a checkpoint."""

import errno
import hashlib
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.stores import sealed
from pipeline.training import checkpoint


class TestCheckpointFile:
    def test_it_holds_tensors_and_plain_values(self, tmp_path: Path) -> None:
        state = {"weights": torch.arange(5.0), "log": {"steps": [{"loss": 0.25}]}, "epoch": 3, "sum": 0.1}
        checkpoint.save(tmp_path / "state", state)
        found = checkpoint.load(tmp_path / "state")
        assert found is not None
        assert torch.equal(found.pop("weights"), state.pop("weights"))  # type: ignore[arg-type]
        assert found == state

    def test_no_copy_of_it_is_held_in_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        written = [0]

        class Buffer(io.BytesIO):
            def write(self, data: Any) -> int:
                written[0] += len(data)
                return super().write(data)

        monkeypatch.setattr("io.BytesIO", Buffer)
        checkpoint.save(tmp_path / "state", {"weights": torch.arange(1e5)})
        assert 0 < written[0] < 1000  # torch writes the pickled structure to memory
        digest, payload = (content := (tmp_path / "state").read_bytes())[:64], content[64:]
        assert digest.decode() == hashlib.sha256(payload).hexdigest()

    @pytest.mark.parametrize("space", [0, 10, 64, 1000, 5000])
    def test_a_full_disk_is_named_and_the_last_one_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: int
    ) -> None:
        """``torch.save`` replaces the error of some writes by its own."""

        class Full(sealed.Writer):
            def __init__(self, file: Any) -> None:
                super().__init__(SimpleNamespace(write=self.limited, flush=file.flush))  # type: ignore[arg-type]
                self.free = space

            def limited(self, data: Any) -> int:
                self.free -= len(data)
                if self.free < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return len(data)

        checkpoint.save(tmp_path / "state", {"epoch": 1})
        monkeypatch.setattr(sealed, "Writer", Full)
        with pytest.raises(OSError, match="No space left on device"):
            checkpoint.save(tmp_path / "state", {"epoch": 2, "weights": torch.zeros(1000)})
        assert checkpoint.load(tmp_path / "state") == {"epoch": 1}
        assert [path.name for path in tmp_path.iterdir()] == ["state"]

    def test_none_is_none(self, tmp_path: Path) -> None:
        assert checkpoint.load(tmp_path / "state") is None

    @pytest.mark.parametrize("cut", [0, 10, 64, 100])
    def test_a_cut_file_is_refused(self, tmp_path: Path, cut: int) -> None:
        checkpoint.save(tmp_path / "state", {"epoch": 3})
        (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:cut])
        with pytest.raises(PipelineError, match=r"state: damaged: sha256 is .*; delete it to start over$"):
            checkpoint.load(tmp_path / "state")

    def test_code_in_a_file_is_not_run(self, tmp_path: Path) -> None:
        """``weights_only``: a pickled call does not load."""

        class Call:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "touched",)

        checkpoint.save(tmp_path / "state", {"epoch": Call()})
        with pytest.raises(Exception, match="Weights only load failed"):
            checkpoint.load(tmp_path / "state")
        torch.save({"epoch": Call()}, tmp_path / "model.pt")
        with pytest.raises(Exception, match="Weights only load failed"):
            checkpoint.load_model(tmp_path / "model.pt")
        assert not (tmp_path / "touched").exists()
