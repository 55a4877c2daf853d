"""GPUs, and the slots by which jobs share them.

A card has a slot for every ``SLOT`` MiB of its memory, or as many as the environment variable WSSS_GPU_SLOTS says. A
job takes the slots that it needs (``slots_needed``) on one card and holds them until its process ends; a job that finds
too few waits, also for jobs of other users. Only visible cards count: CUDA_VISIBLE_DEVICES may hold numbers, UUIDs of
cards and UUIDs of MIG instances. On a card in MIG mode, each instance counts as a card.

The cards are listed by nvidia-smi, before CUDA starts, since a process sees at most one MIG instance, which
CUDA_VISIBLE_DEVICES must select before. Where nvidia-smi is missing, torch lists them.
"""

import functools
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.config.dataset import Demo
from pipeline.config.schema import Augmentation, Training
from pipeline.errors import PipelineError
from pipeline.stores import locks

SLOT = 8000  # MiB
VARIABLE = "WSSS_GPU_SLOTS"
VISIBLE = "CUDA_VISIBLE_DEVICES"
FOLDER = "wsss-cards"  # in the folder of temporary files, where the slots of all users are locked
POLL = 1.0  # seconds between two looks for free slots
# The memory of a training, estimated for ResNet-101 at an output stride of 8; most networks need less.
CONTEXT = 2000  # MiB: CUDA itself, the weights, the optimizer and the workspace of convolutions
PER_PIXEL = 6.0  # kB per input pixel of a batch: activations and gradients
UNKNOWN_SIDE = 512  # assumed side of an input that is neither resized nor cropped

_UNGUARDED = "jobs may share a GPU beyond its slots; select one for each with --device cuda:N"
_held: list[IO[str]] = []  # lock files of this process's slots
_chosen: dict[str, str] = {}  # by what was asked for; a process takes slots once


@dataclass(frozen=True)
class Card:
    """A GPU or a MIG instance."""

    name: str
    uuid: str
    memory: int  # MiB

    @property
    def slots(self) -> int:
        """The number of slots; at least 1."""
        text = os.environ.get(VARIABLE, "")
        if text and not (text.isdecimal() and int(text) >= 1):
            raise PipelineError(f"{VARIABLE}={text}: must be a number of slots per GPU, at least 1")
        return int(text) if text else max(1, self.memory // SLOT)


def slots_needed(block: Any, demo: Demo | None) -> int:
    """Return the slots that a job on this block needs: one for inference, more for a training on large batches.

    The memory of a training is ``CONTEXT`` + ``PER_PIXEL`` x pixels of a batch, for each of its backbones. A training
    in several processes needs these slots on the GPU of each, for its part of the batch.

    Args:
        demo: the dataset if it is generated; its images have a known size.
    """
    training, augmentation = getattr(block, "training", None), getattr(block, "augmentation", None)
    if not isinstance(training, Training) or not isinstance(augmentation, Augmentation):
        return 1
    side = augmentation.crop or (augmentation.length[1] if augmentation.length else demo.size if demo else UNKNOWN_SIDE)
    if augmentation.scale and not augmentation.crop:
        side = round(side * augmentation.scale[1])
    backbones = len(getattr(block, "backbones", ())) or 1
    memory = CONTEXT + backbones * PER_PIXEL * training.batch_size / training.processes * side**2 / 1024
    return max(1, -(-round(memory) // SLOT))


@functools.cache
def visible() -> tuple[Card, ...]:
    """List the cards that CUDA_VISIBLE_DEVICES leaves, in its order, without loading CUDA.

    Its numbers are those of nvidia-smi. As in CUDA, an entry that names no card ends the list.
    """
    text = _smi("--query-gpu=memory.total", "--format=csv,noheader,nounits")
    memories = [int(line) if line.isdecimal() else 0 for line in text]
    cards: list[Card] = []
    instances: dict[str, list[Card]] = {}  # of a card in MIG mode, by its UUID
    for line in _smi("--list-gpus"):
        if card := re.match(r"GPU \d+: (.+) \(UUID: (GPU-[^)]+)\)", line):
            cards.append(Card(card[1], card[2], memories[len(cards)] if len(cards) < len(memories) else 0))
        elif mig := re.match(r"\s+MIG (\S*?(\d+)gb\S*)\s+Device\s+\d+: \(UUID: (MIG-[^)]+)\)", line):
            part = Card(f"{cards[-1].name} MIG {mig[1]}", mig[3], int(mig[2]) * 1000)
            instances.setdefault(cards[-1].uuid, []).append(part)
    chosen = os.environ.get(VISIBLE)
    if chosen is None:
        return tuple(part for card in cards for part in instances.get(card.uuid, [card]))
    selected: list[Card] = []
    for entry in chosen.split(","):
        whole = _named(entry.strip(), cards)
        parts = instances.get(whole.uuid, [whole]) if whole else _instance(entry.strip(), instances)
        if not parts:
            break
        selected += [part for part in parts if part not in selected]
    return tuple(selected)


def _named(entry: str, cards: Sequence[Card]) -> Card | None:
    if entry.isdecimal():
        return cards[int(entry)] if int(entry) < len(cards) else None
    matching = [card for card in cards if entry.startswith("GPU-") and card.uuid.startswith(entry)]
    return matching[0] if len(matching) == 1 else None


def _instance(entry: str, instances: Mapping[str, Sequence[Card]]) -> list[Card]:
    return [part for parts in instances.values() for part in parts if entry and part.uuid.startswith(entry)][:1]


def _smi(*arguments: str) -> list[str]:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def total_slots() -> int:
    """The number of slots of all visible cards; 0 without a card."""
    return sum(card.slots for card in visible())


def attainable(needed: int, cards: Iterable[Card], count: int = 1) -> int:
    """Reduce the slots that a job needs on each of ``count`` cards to what the ``count`` largest cards have."""
    return min([needed, *sorted((card.slots for card in cards), reverse=True)[:count]])


def choose(device: str, needed: int) -> str:
    """Take slots for this process, and return the device to use.

    Call this before CUDA starts. Of the cards with enough free slots, the one with the most is chosen.

    Args:
        device: 'auto' (a GPU if there is one, else the CPU), 'cpu', 'cuda' (a GPU) or 'cuda:N' (the GPU N).
        needed: number of slots; if no card has as many, the one with the most is taken whole.

    Raises:
        PipelineError: there is no such GPU.
    """
    return _chosen[device] if device in _chosen else adopt(device, reserve(device, needed)[0])


def adopt(device: str, name: str) -> str:
    """Make this process use the card that ``reserve`` has named; return the device of torch."""
    if name.startswith(("GPU-", "MIG-")):
        os.environ[VISIBLE], name = name, "cuda:0"
    if name.startswith("cuda"):
        _chosen[device] = _chosen[name] = name  # also by the name that it has from now on
    return name


def release() -> None:
    """Give the slots of this process back, before it waits for another process that needs them.

    A card with a single slot would otherwise let both wait for ever. Memory that this process has on the card stays.
    """
    while _held:
        _held.pop().close()
    _chosen.clear()


def reserve(device: str, needed: int, processes: int = 1) -> list[str]:
    """Take slots on as many cards as there are processes, and hold them until this process ends.

    Args:
        device: see ``choose``.
        needed: number of slots on each card.

    Returns:
        For each process, the UUID of its card, by which CUDA_VISIBLE_DEVICES selects it, or its device in torch.

    Raises:
        PipelineError: there is no such GPU, or there are fewer than processes; or fewer cores, on the CPU.
    """
    wanted, selectable = _candidates(device, processes)
    if wanted is None:
        return [device if device != "auto" else "cpu"] * processes
    names = []
    for number, slots in _take(wanted, needed, processes):
        card = wanted[number]
        shown = ", ".join(map(str, slots))
        print(f"device: {card.name} ({card.uuid}), slot{'s'[: len(slots) > 1]} {shown} of {card.slots}", flush=True)
        names.append(card.uuid if selectable else f"cuda:{number}")
    return names


def require(device: str, processes: int) -> None:
    """Check that there is a GPU, or on the CPU a core, for each process.

    Raises:
        PipelineError: there is not; or there is no such GPU.
    """
    _candidates(device, processes)


def _candidates(device: str, processes: int) -> tuple[dict[int, Card] | None, bool]:
    """Return the cards to choose from, None for the CPU, and whether CUDA_VISIBLE_DEVICES can still select them."""
    selectable: Sequence[Card] = ()
    cards: Sequence[Card] = ()
    if device == "auto" or device.startswith("cuda"):
        import torch  # here, since planning imports this module

        starting = torch.version.cuda is not None and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        selectable = visible() if starting else ()  # by CUDA_VISIBLE_DEVICES; other cards are selected by number
        cards = selectable or _torch_cards()
    if not cards:
        if device.startswith("cuda"):
            raise PipelineError(f"--device {device}: this torch sees no CUDA device; use --device cpu")
        if processes > (cores := len(os.sched_getaffinity(0))):
            raise PipelineError(f"training.processes: {processes} processes need as many cores, not {cores}; lower it")
        return None, False
    number = device.removeprefix("auto").removeprefix("cuda").removeprefix(":")
    if number and not (number.isdecimal() and int(number) < len(cards)):
        raise PipelineError(f"--device {device}: the GPUs are cuda:0 to cuda:{len(cards) - 1}")
    wanted = {index: cards[index] for index in (range(len(cards)) if not number else [int(number)])}
    if processes > 1:
        wanted = {index: card for index, card in wanted.items() if not card.uuid.startswith("MIG-")}  # as NCCL demands
        if processes > len(wanted):
            raise PipelineError(
                f"training.processes: {processes} processes need as many GPUs, and there "
                f"{'is' if len(wanted) == 1 else 'are'} {len(wanted)} to choose from (--device {device}; MIG instances "
                "do not count); lower it, or run on a larger machine"
            )
    return wanted, bool(selectable)


def _torch_cards() -> tuple[Card, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    properties = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return tuple(Card(each.name, f"GPU-{each.uuid}", each.total_memory >> 20) for each in properties)


def _take(cards: Mapping[int, Card], needed: int, count: int) -> list[tuple[int, list[int]]]:
    """Lock slots on ``count`` cards; wait until there are enough. Return the numbers of the cards and of the slots."""
    folder = Path(tempfile.gettempdir()) / FOLDER
    with suppress(FileExistsError):
        folder.mkdir()
        folder.chmod(0o1777)  # jobs of all users share the cards
    least = attainable(needed, cards.values(), count)  # a smaller card lacks the memory, so the job waits for another
    wanted = {number: min(needed, card.slots) for number, card in cards.items() if card.slots >= least}
    waited = False
    while True:
        with _lock_file(folder / "choosing") as choosing:  # otherwise two jobs could each take half of what both need
            locks.take(choosing, _UNGUARDED, wait=True)
            free = {number: _lock_free(folder, cards[number]) for number in wanted}
            fitting = [number for number in wanted if len(free[number]) >= wanted[number]]
            numbers = sorted(fitting, key=lambda each: (-len(free[each]), each))[:count]
            taken = [(number, list(free[number])[: wanted[number]]) for number in numbers if len(numbers) == count]
            for number, files in free.items():
                for slot, file in files.items():
                    if slot in dict(taken).get(number, ()):
                        _held.append(file)
                    else:
                        file.close()
        if taken:
            return taken
        if not waited:
            who = "no GPU has" if count == 1 else f"fewer than {count} GPUs have"
            print(f"waiting: {who} {needed} free slots; {VARIABLE} changes their number", flush=True)
            waited = True
        time.sleep(POLL)


def _lock_file(path: Path) -> IO[str]:
    """Open a lock file that a job of any user may have created, or create it.

    Raises:
        PipelineError: another user has closed the file or its folder to this one.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW
    try:
        try:
            descriptor = os.open(path, flags)  # Linux may refuse O_CREAT for a file of another user (protected_regular)
        except FileNotFoundError:
            descriptor = os.open(path, flags | os.O_CREAT)
            os.fchmod(descriptor, 0o666)
    except OSError as error:
        raise PipelineError(f"{path}: {error.strerror}; remove {path.parent}, by which jobs share GPUs") from error
    return os.fdopen(descriptor, "r+")


def _lock_free(folder: Path, card: Card) -> dict[int, IO[str]]:
    """Lock all free slots of a card."""
    free: dict[int, IO[str]] = {}
    for slot in range(card.slots):
        file = _lock_file(folder / f"{card.uuid}.{slot}")
        if locks.take(file, _UNGUARDED) is locks.Lock.BUSY:
            file.close()
        else:
            free[slot] = file
    return free
