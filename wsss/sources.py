"""The photos that a command names: files, folders, lists and stdin, and the name of each photo's output files."""

import hashlib
import os
import sys
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.photos import SUFFIXES
from pipeline.errors import PipelineError

LIST = ".txt"
STDIN = "-"
LONGEST = 220  # bytes of a part of an output's path


@dataclass(frozen=True)
class Source:
    """A photo.

    Attributes:
        file: its path.
        relative: its path below the folder that was named, or as it was named; with '/'.
    """

    file: Path
    relative: str

    @property
    def key(self) -> str:
        """The photo's identity: its absolute path, with '/'."""
        return Path(os.path.abspath(self.file)).as_posix()


def find(arguments: Sequence[str], out: Path) -> list[Source]:
    """Find the photos that command-line arguments name, each once, except those in the output folder ``out``.

    =============  =====================================================================
    a folder       all photos in it and its subfolders, sorted, by their suffix
    ``LIST.txt``   the files and folders that it names, one a line, from the working folder or else from the list's
    ``-``          the same from stdin
    other          the file itself, whatever its suffix
    =============  =====================================================================

    Raises:
        PipelineError: a file, folder or list does not exist, or there is no photo; it has a line for each fault.
    """
    faults: list[str] = []
    sources: dict[str, Source] = {}
    for source in _expand(arguments, faults):
        if not Path(source.key).is_relative_to(os.path.abspath(out)):
            sources.setdefault(source.key, source)
    if not faults and not sources:
        faults.append(f"{' '.join(arguments)}: no photo found; photos end in {', '.join(SUFFIXES)}")
    if faults:
        raise PipelineError(*faults)
    return list(sources.values())


def _expand(arguments: Iterable[str], faults: list[str], base: Path | None = None) -> Iterator[Source]:
    arguments = list(arguments)
    several = len(arguments) > 1
    for argument in arguments:
        path = Path(argument)
        if base is not None and not path.exists():
            path = base / argument
        if argument == STDIN and base is None:
            yield from _expand(_lines(sys.stdin.read()), faults, Path())
        elif path.is_dir():
            prefix = f"{path.resolve().name}/" if several else ""
            for file in _photos(path):
                yield Source(file, prefix + file.relative_to(path).as_posix())
        elif not path.exists():
            faults.append(f"{argument}: no such file or folder; correct the path")
        elif path.suffix.lower() == LIST and base is None:
            yield from _list(path, faults)
        else:
            yield Source(path, _relative(path))


def _list(path: Path, faults: list[str]) -> Iterator[Source]:
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"{path}: cannot be read as a list of photos ({error}); save it as UTF-8, a path a line")
        return
    yield from _expand(_lines(text), faults, path.parent)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _photos(folder: Path) -> Iterator[Path]:
    """The photos in a folder and its subfolders; hidden files and folders are skipped."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(root) / name


def _relative(path: Path) -> str:
    """The path as it was named if it lies below the working folder, else the file's name."""
    absolute = Path(os.path.abspath(path))
    return absolute.relative_to(Path.cwd()).as_posix() if absolute.is_relative_to(Path.cwd()) else path.name


def output_name(source: Source, taken: Collection[str]) -> str:
    """The name of a photo's output files, without a suffix: 'a/b' for a/b.jpg.

    If another photo has it, it is 'a/b.jpg', or else it starts with as many more parent folders as needed. ``taken``
    holds the ``folded`` names of other photos.
    """
    path = Path(source.relative)
    parents = Path(source.key).parent.parts[1:]
    candidates = [
        path.with_suffix(""),
        path,
        *(Path(*parents[-count:], path.name) for count in range(1, len(parents) + 1)),
    ]
    names = [name for candidate in candidates if (name := _inside(candidate))]
    return next((name for name in names if folded(name) not in taken), names[-1])


def _inside(path: Path) -> str:
    """The path without the parts that would leave the output folder. A photo's relative path may begin with '..'."""
    return "/".join(_shortened(part) for part in path.parts if part not in (path.anchor, os.pardir))


def _shortened(part: str) -> str:
    """A part of a path that leaves room for suffixes in the 255 bytes that file systems allow."""
    code = part.encode()
    if len(code) <= LONGEST:
        return part
    return f"{code[: LONGEST - 9].decode(errors='ignore')}-{hashlib.sha256(code).hexdigest()[:8]}"


def folded(name: str) -> str:
    """The name as file systems compare it that ignore case and the form of accents."""
    return unicodedata.normalize("NFC", name).casefold()
