"""The index: the checked description of a dataset that all later stages read."""

import json
import mmap
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from pipeline.errors import PipelineError

_IMAGES, _SEPARATOR, _END = b',\n "images": {\n', b":\t", b" }}\n"


@dataclass(frozen=True)
class Image:
    """One image. ``tags`` are sorted class ids in 1..K; empty if an evaluation image's tags are unknown.

    All stages work at ``height`` x ``width``. If its file is larger than ``dataset.working_megapixels``, ``file_size``
    is the file's (height, width), and whatever is read from files is reduced. ``mask`` and ``saliency`` are None in the
    parts of an index for stages that do not read them (``pipeline.data.parts``).
    """

    id: str
    file: Path
    height: int
    width: int
    tags: tuple[int, ...]
    mask: Path | None
    saliency: Path | None
    sha256: str | None = None  # of the image file
    mask_sha256: str | None = None
    saliency_sha256: str | None = None
    file_size: tuple[int, int] | None = None
    # (class id, left, top, right, bottom) of each object in working pixels, from ``dataset.boxes``; evaluation only
    boxes: tuple[tuple[float, ...], ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """The working (height, width)."""
        return self.height, self.width

    @property
    def file_pixels(self) -> int:
        """The number of pixels of the file."""
        height, width = self.file_size or self.size
        return height * width


class Index:
    """The images, the two splits, and the class names (class id k is ``classes[k - 1]``).

    The file is JSON with one line per image (``write``). It is mapped, and an image's line is parsed whenever the image
    is asked for. In memory an image takes 16 bytes: the place of its line, and the number of the line in its split.

    Raises:
        PipelineError: the file cannot be read or is not an index.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._reading():
            self._parse(path)

    def _parse(self, path: Path) -> None:
        with path.open("rb") as file:
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if (end := self._content.find(_IMAGES)) < 0:
            raise ValueError("it has no line for the images")
        raw, start = json.loads(self._content[:end] + b"\n}"), end + len(_IMAGES)
        self.classes: list[str] = raw["classes"]
        self.tag_source: str = raw.get("tag_source", "")  # train.json has none
        self._root = Path(raw["root"])
        self._starts = array("q")
        ids: list[str] = []
        self._content.seek(start)
        names: list[bytes] = []
        while (line := self._content.readline()) not in (_END, b""):
            self._starts.append(start)
            names.append(line[: line.index(_SEPARATOR)])
            start += len(line)
            if len(names) == 10_000:  # decoded together, since a call takes longer than an id
                ids += json.loads(b"[" + b",".join(names) + b"]")
                names.clear()
        if line != _END:
            raise ValueError("it is cut off")
        ids += json.loads(b"[" + b",".join(names) + b"]")
        rows = {name: row for row, name in enumerate(ids)}
        if not len(rows) == len(ids) == len(self._starts):
            raise ValueError("an id is twice in it")
        self._splits = {}
        for split in ("train", "evaluation"):
            listed = raw["splits"].pop(split)
            if unknown := next((name for name in listed if name not in rows), None):
                raise ValueError(f"no entry for {unknown}")
            self._splits[split] = array("q", (rows[name] for name in listed))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise PipelineError(f"{self.path}: not an index ({error!r:.200}); run the index stage again") from error

    def __reduce__(self) -> tuple[type["Index"], tuple[Path]]:
        return Index, (self.path,)

    def __len__(self) -> int:
        return len(self._starts)

    def image(self, row: int) -> Image:
        """Return the image on a line of the index."""
        with self._reading():
            start = self._starts[row]
            name, _, line = self._content[start : self._content.find(b"\n", start)].partition(_SEPARATOR)
            entry = json.loads(line.rstrip(b","))
            return Image(
                json.loads(name),
                _below(self._root, entry["file"]),
                entry["height"],
                entry["width"],
                tuple(entry["tags"]),
                _below(self._root, entry["mask"]) if entry["mask"] else None,
                Path(entry["saliency"]) if entry["saliency"] else None,
                entry.get("sha256"),
                entry.get("mask_sha256"),
                entry.get("saliency_sha256"),
                tuple(entry["file_size"]) if "file_size" in entry else None,
                tuple(map(tuple, entry.get("boxes") or ())),
            )

    def images(self, split: str | None = None) -> "Images":
        """Images of the split ``train`` or ``evaluation`` in list order, or all images if ``split`` is None."""
        return Images(self, range(len(self)) if split is None else self._splits[split])

    @property
    def num_classes(self) -> int:
        """K, without background."""
        return len(self.classes)

    def id(self, row: int) -> str:
        """Return the id of the image on a line of the index, without parsing the rest of the line."""
        start = self._starts[row]
        name: str = json.loads(self._content[start : self._content.find(_SEPARATOR, start)])
        return name


class Images(Sequence[Image]):
    """Some images of an index. Each is read from the index when it is asked for; a slice is a list."""

    def __init__(self, index: Index, rows: Sequence[int]) -> None:
        self._index, self._rows = index, rows

    @overload
    def __getitem__(self, number: int) -> Image: ...
    @overload
    def __getitem__(self, number: slice) -> list[Image]: ...
    def __getitem__(self, number: int | slice) -> Image | list[Image]:
        if isinstance(number, slice):
            return [self._index.image(row) for row in self._rows[number]]
        return self._index.image(self._rows[number])

    def __len__(self) -> int:
        return len(self._rows)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    @property
    def ids(self) -> Iterator[str]:
        """The ids of the images."""
        return map(self._index.id, self._rows)

    def having(self, condition: Callable[[str], bool]) -> "Images":
        """The images whose ids meet a condition."""
        return Images(self._index, array("q", (row for row in self._rows if condition(self._index.id(row)))))


def write(path: Path, raw: Mapping[str, Any]) -> None:
    """Write an index: ``root``, ``classes``, ``splits``, perhaps ``tag_source``, and ``images``, one per line.

    JSON escapes newlines and tabs in strings, so that both are safe as separators.
    """
    head = json.dumps({key: value for key, value in raw.items() if key != "images"}, indent=1)
    with path.open("wb") as file:
        file.write(head.removesuffix("\n}").encode() + _IMAGES)
        for number, (name, entry) in enumerate(raw["images"].items(), 1):
            end = b",\n" if number < len(raw["images"]) else b"\n"
            file.write(json.dumps(name).encode() + _SEPARATOR + json.dumps(entry).encode() + end)
        file.write(_END)


def _below(root: Path, path: str) -> Path:
    """Resolve '..' of files outside of ``root`` lexically, as they were indexed, even if ``root`` is a symlink."""
    return Path(os.path.normpath(root / path))
