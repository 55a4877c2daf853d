"""Functions of stages, in variants for tests, which other ranks of a stage can call, too."""

import json
import os
import signal
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from pipeline import ranks
from pipeline.data import collation
from pipeline.errors import PipelineError
from pipeline.stores.blocks import write_blocks
from pipeline.training import models
from pipeline.workflow import apply


def in_float64(stage: str, work: Any) -> None:
    """Train in float64, so that two ways to add the same numbers agree far beyond the rounding of float32."""
    normalised, build, grid_sample = collation._normalised, models.build, functional.grid_sample
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            patch.setattr(collation, "_normalised", lambda pixels: normalised(pixels).double())
            patch.setattr(models, "build", lambda *arguments: build(*arguments).double())
            patch.setattr(
                functional,
                "grid_sample",
                lambda maps, grid, *rest, **more: grid_sample(maps, grid.to(maps), *rest, **more),
            )
            import_module(f"stages.{stage}").main(work)
    finally:
        torch.set_default_dtype(torch.float32)


def in_small_blocks(stage: str, work: Any) -> None:
    """Compute blocks of 3 images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apply, "write_blocks", partial(write_blocks, size=3))
        import_module(f"stages.{stage}").main(work)


def stopped_after_two_blocks(stage: str, work: Any) -> None:
    """Fail in rank 0 once both ranks have saved a block."""

    def stopping(images: Any, compute: Any, writer: Any, checkpoint: Path, **more: Any) -> None:
        def computed(block: Any) -> Any:
            yield from compute(block)
            if ranks.place().rank == 0 and (checkpoint / "00000.part").exists():
                while not (checkpoint / "00001.part").exists():
                    time.sleep(0.01)
                raise PipelineError("stopped")
            if ranks.place().rank == 1 and (checkpoint / "00001.part").exists():
                time.sleep(600)

        write_blocks(images, computed, writer, checkpoint, size=3, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apply, "write_blocks", stopping)
        import_module(f"stages.{stage}").main(work)


def with_kept_parts(stage: str, path: Path, work: Any) -> None:
    """Compute blocks of 3 images, and note when the part files were written."""
    in_small_blocks(stage, work)
    parts = {part.name: part.stat().st_mtime_ns for part in work.checkpoint.glob("*.part")}
    path.write_text(json.dumps(parts))


def note_runtime(path: Path, work: Any) -> None:
    options = {name: getattr(work.runtime, name) for name in ("threads", "workers", "cache")}
    Path(f"{path}-{ranks.place().rank}.json").write_text(json.dumps(options))
    ranks.leave()
    while ranks.working(1):
        time.sleep(0.01)
    raise PipelineError("noted")


def refuse(work: Any) -> None:
    if ranks.place().rank:
        raise PipelineError("rank 1 refuses")
    while ranks.working(1):
        time.sleep(0.01)


def crash(work: Any) -> None:
    if ranks.place().rank:
        raise ValueError("a bug")
    while ranks.working(1):
        time.sleep(0.01)


def leave_rank_0_waiting(work: Any) -> None:
    """Die while rank 0 fails because of it, as a collective operation does."""
    if ranks.place().rank:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    raise RuntimeError("Connection closed by peer")
