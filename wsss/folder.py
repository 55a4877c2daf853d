"""The output folder: which photos it describes, what is missing or out of date, and the files of all photos together.

``.wsss/PHOTO.json`` records each photo: its path, what its outputs were made from (``basis``), and what each format
needs for the files that describe all photos. It is written last, so that an interrupted run repeats only one photo.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.stores.files import atomic
from wsss.formats import FORMATS, Collected, Item
from wsss.sources import Source, folded, output_name

RECORDS = ".wsss"


class OutputError(PipelineError):
    """The output folder cannot be written, so that going on makes no sense."""


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{root}: cannot be written: {error.strerror}; choose another --out, or free space") from None


def parse_formats(text: str) -> list[str]:
    """Read a list of formats such as 'png,coco'.

    Raises:
        PipelineError: a format is unknown.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        raise PipelineError(f"--formats {text}: {', '.join(unknown) or 'nothing'} is none of {', '.join(FORMATS)}")
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Record:
    """What is known of a photo in the folder.

    Attributes:
        key: absolute path of the photo.
        name: of its output files.
        basis: what the outputs depend on: hashes of photo and model, tags and options.
        entries: by format, the value for the files that describe all photos; null for formats without such files.
    """

    key: str
    name: str
    basis: Mapping[str, Any]
    entries: Mapping[str, Any]


class OutputFolder:
    """An output folder.

    Raises:
        PipelineError: a record cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.records: dict[str, Record] = {}
        self._names: dict[str, str] = {}  # key of the photo by folded name
        for file in sorted((root / RECORDS).rglob("*.json")):
            try:
                record = Record(**json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                raise PipelineError(f"{file}: damaged; delete it, and its photo is segmented again") from None
            self.records[record.key] = record
            self._names[folded(record.name)] = record.key

    def name(self, source: Source) -> str:
        """The name of a photo's output files: the recorded one, or one that no other photo has."""
        record = self.records.get(source.key)
        name = record.name if record else output_name(source, self._names)
        self._names[folded(name)] = source.key
        return name

    def is_current(self, source: Source, basis: Mapping[str, Any], formats: Sequence[str]) -> bool:
        """Whether the outputs of a photo in all formats exist and were made from the same things."""
        record = self.records.get(source.key)
        if record is None or record.basis != basis or not set(formats) <= set(record.entries):
            return False
        return all(path.exists() for name in formats for path in FORMATS[name].files(record.name, self.root))

    def all_formats(self, source: Source, formats: Sequence[str]) -> list[str]:
        """The formats to write for a photo: those of this run and of earlier ones, whose files are out of date."""
        earlier = self.records.get(source.key)
        return list(dict.fromkeys([*formats, *(earlier.entries if earlier else ())]))

    def write(self, source: Source, item: Item, basis: Mapping[str, Any], formats: Sequence[str]) -> None:
        """Write a photo's files in these formats, and its record.

        Raises:
            OutputError: a file cannot be written.
        """
        with _writing(self.root):
            entries = {name: FORMATS[name].write(item, self.root) for name in formats}
            record = Record(source.key, item.name, dict(basis), entries)
            with atomic(self.root / RECORDS / f"{item.name}.json") as temporary:
                temporary.write_text(json.dumps(vars(record), ensure_ascii=False), encoding="utf-8")
        self.records[source.key] = record

    def join(self, formats: Sequence[str], classes: tuple[str, ...], matches: Callable[[Record], bool]) -> int:
        """Write the files that describe all photos whose record ``matches``, and return the number of other photos.

        Raises:
            OutputError: a file cannot be written.
        """
        records = sorted((record for record in self.records.values() if matches(record)), key=lambda one: one.name)
        for name in formats:
            form = FORMATS[name]
            if isinstance(form, Collected):
                with _writing(self.root):
                    form.join(self._entries(records, name), classes, self.root)
        return len(self.records) - len(records)

    def _entries(self, records: Sequence[Record], name: str) -> Iterator[Any]:
        return (record.entries[name] for record in records if name in record.entries)
