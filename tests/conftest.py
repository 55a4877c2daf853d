"""What all tests share: a single arithmetic thread in each process, since pytest-xdist starts a process per core."""

import os
import signal
import sys
from collections.abc import Generator, Iterator

import pytest

import stages  # noqa: F401  # its settings of OpenMP and malloc must come before torch is imported
from pipeline import arithmetic, cards

pytest_plugins = ["tests.finished", "tests.nvidia_smi", "tests.trained"]  # fixtures

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # and this at the first product of matrices on a GPU
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as in a shell's background, which all that tests start would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Undo what a stage run in this process does.

    Threads that wait for each other on busy cores are slow, and hypothesis draws denormal numbers.

    The arithmetic of one test is not that of the next.
    """
    with arithmetic.recording():
        yield
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
        torch.set_flush_denormal(False)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """torch refuses operations that differ from run to run, as under ``--deterministic``."""
    import torch

    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Show GPUs only to tests marked ``cuda``, to their fixtures and to the processes that they start.

    By default stages use a GPU if there is one, and all other tests expect a CPU's bytes. Marks that skip tests without
    a GPU have already been evaluated. The slots that a test took are given back.
    """
    cards.visible.cache_clear()
    before = os.environ.get(cards.VISIBLE)
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("cuda") is None:
            os.environ[cards.VISIBLE] = ""
            if (torch := sys.modules.get("torch")) is not None:
                patch.setattr(torch.cuda, "is_available", lambda: False)
        try:
            return (yield)
        finally:
            cards.release()
            os.environ.pop(cards.VISIBLE, None)
            if before is not None:
                os.environ[cards.VISIBLE] = before
