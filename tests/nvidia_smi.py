"""A stand-in for nvidia-smi that lists a test's cards, and a choice among them as a new process makes it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import cards

TWO = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-11111111-aaaa)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-12222222-bbbb)
"""
MIG = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c89852c)
  MIG 3g.20gb     Device  0: (UUID: MIG-aaaa)
  MIG 1g.5gb+me   Device  1: (UUID: MIG-bbbb)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-5c891111)
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Install an nvidia-smi that prints a list of cards and their memory; the function that sets both is the value."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()

    def install(listed: str, *memories: int | str) -> None:
        memory = "\n".join(map(str, memories))
        program.write_text(
            f"#!/bin/sh\ncase $1 in --list-gpus) cat <<'E'\n{listed}E\n;; *) cat <<'E'\n{memory}\nE\nesac\n"
        )
        program.chmod(0o755)
        cards.visible.cache_clear()

    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv(cards.VISIBLE, raising=False)
    monkeypatch.delenv(cards.VARIABLE, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(cards, "_held", [])
    monkeypatch.setattr(cards, "_chosen", {})
    monkeypatch.setattr(cards, "POLL", 0.01)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    yield install
    for file in cards._held:
        file.close()
    cards.visible.cache_clear()


def choose(device: str = "auto", needed: int = 1) -> tuple[str, str | None]:
    """Choose as a new process does, except that this process keeps its locks. Return the device and visible cards."""
    cards._chosen.clear()
    before = os.environ.get(cards.VISIBLE)
    try:
        return cards.choose(device, needed), os.environ.get(cards.VISIBLE)
    finally:
        if before is None:
            os.environ.pop(cards.VISIBLE, None)
        else:
            os.environ[cards.VISIBLE] = before
