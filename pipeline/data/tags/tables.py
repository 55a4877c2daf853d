"""Tables of tags: a row an image, a tag or an object, or a column a class; any delimiter, any header or none."""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data.tags.annotations import Annotations, as_field, key_of, titles_photos, titles_tags, truth
from pipeline.data.tags.matching import Photos, has_suffix

DELIMITERS = {",": "','", ";": "';'", "\t": "tab", "|": "'|'"}
_SAMPLE = 300  # rows that decide on the form of a table
_SPLIT = re.compile(r"train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?|eval(?:uation)?|unassigned")
_NUMBER = re.compile(r"\s*+[-+]?(?:[0-9]++(?:[.,][0-9]*+)?|[.,][0-9]++)(?:[eE][-+]?[0-9]++)?\s*+")
_NUMBERED_TAG = re.compile(r"(?:tag|label|class|category|object)s?[0-9]+")
_BOXES = 4  # numeric columns of a table with an object a row

Row = list[str]


@dataclass(frozen=True)
class Table:
    """Rows with their line numbers; ``header`` is None without one."""

    header: Row | None
    rows: list[tuple[int, Row]]
    delimiter: str

    @property
    def width(self) -> int:
        """The number of columns, of the header if there is one."""
        return len(self.header) if self.header else max((len(row) for _, row in self.rows), default=0)

    def column(self, number: int) -> list[str]:
        """The cells of a column in the rows that decide on the form; '' where a row is too short."""
        return [row[number].strip() if number < len(row) else "" for _, row in self.rows[:_SAMPLE]]

    def title(self, number: int) -> str:
        return self.header[number].strip() if self.header and number < len(self.header) else ""


def delimiter_of(text: str, photos: Photos) -> str | None:
    """The delimiter under which most rows have a cell that names a photo; None if no delimiter occurs."""
    lines = [line for line in text.split("\n", _SAMPLE)[:_SAMPLE] if line.strip()]
    best, best_score = None, (0, 0, 0)
    for delimiter in DELIMITERS:
        rows = [_cells(line, delimiter) for line in lines if delimiter in line]
        named = sum(any(_is_photo(cell, photos) for cell in row) for row in rows)
        usual = delimiter in lines[0] and any(map(titles_photos, rows[0]))
        score = (named, int(usual), len(rows))
        if rows and score > best_score:
            best, best_score = delimiter, score
    return best


def is_table(text: str, delimiter: str, photos: Photos) -> bool:
    """Whether text without a table's suffix is a table: after a header of a photo and more, or with a photo first."""
    rows = [_cells(line, delimiter) for line in text.split("\n", _SAMPLE)[:_SAMPLE] if line.strip()]
    if len(rows[0]) > 1 and titles_photos(rows[0][0]):
        return True
    return all(len(row) > 1 and _is_photo(row[0], photos) for row in rows)


def _cells(line: str, delimiter: str) -> Row:
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error:
        return []


def _is_photo(cell: str, photos: Photos) -> bool:
    return has_suffix(cell.strip()) or photos.knows(cell.strip())


def read(text: str, delimiter: str, photos: Photos, out: Annotations) -> None:
    """Read a table of tags."""
    table = _parse(text, delimiter, photos, out)
    name = _photo_column(table, photos)
    if name is None:
        columns = ", ".join(repr(title) for title in table.header or table.rows[0][1]) if table.width else "none"
        out.fault("tag file", f"no column names photos (columns: {columns}); name one 'filename'")
        return
    out.joins = True
    others = [number for number in range(table.width) if number != name]
    tagged = _tag_columns(table, others)
    if tagged is None:
        _read_classes(table, name, others, out)
    elif tagged:
        _read_tags(table, name, tagged, others, out)
    else:
        titles = ", ".join(repr(table.title(number) or f"column {number + 1}") for number in others)
        fix = "title the column of tags 'tags'" if others else "add a column 'tags'"
        out.fault("tag file", f"no column is recognized as tags (besides photos: {titles or 'none'}); {fix}")


def _parse(text: str, delimiter: str, photos: Photos, out: Annotations) -> Table:
    rows: list[tuple[int, Row]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if number == 1 and re.fullmatch(r"\s*sep=.\s*", line):  # Excel's
            continue
        try:  # line by line, so that an unclosed quote does not swallow the rest of the file
            cells = next(csv.reader([line], delimiter=delimiter, strict=True, skipinitialspace=True), [])
        except csv.Error as error:
            out.fault("line of a CSV file", f"line {number} is not CSV ({error}); correct its quotes")
            continue
        if any(cell.strip() for cell in cells):
            rows.append((number, cells))
    header = rows[0][1] if rows and _is_header(rows, photos) else None
    return Table(header, rows[1:] if header else rows, delimiter)


def _is_header(rows: Sequence[tuple[int, Row]], photos: Photos) -> bool:
    """Whether the first row holds titles: it names no photo, and it has a usual title or the next rows name photos."""
    first = [cell.strip() for cell in rows[0][1]]
    if any(map(titles_photos, first)):
        return True
    if any(_is_photo(cell, photos) for cell in first):
        return False
    if any(map(titles_tags, first)):
        return True
    return any(_is_photo(cell, photos) for _, row in rows[1:_SAMPLE] for cell in row)


def _photo_column(table: Table, photos: Photos) -> int | None:
    """The column with most cells that name photos; a usual title decides where no cell does."""
    counts = [
        sum(
            _is_photo(cell, photos)
            for cell in table.column(number)
            if not _NUMBER.fullmatch(cell) or photos.knows(cell)
        )
        for number in range(table.width)
    ]
    titled = [number for number in range(table.width) if titles_photos(table.title(number))]
    if max(counts, default=0):
        best = max(counts)
        return next((number for number in titled if counts[number] >= best / 2), counts.index(best))
    return titled[0] if titled else 0 if table.width > 1 and table.header is None else None


def _tag_columns(table: Table, others: Sequence[int]) -> list[int] | None:
    """The columns that hold tags; empty if none is recognized, None if columns stand for classes."""
    texts = [number for number in others if not _is_numeric(table, number) and not _is_split(table, number)]
    titled = [number for number in others if titles_tags(table.title(number))]
    numbered = [number for number in others if _NUMBERED_TAG.fullmatch(key_of(table.title(number)))]
    worded = [number for number in titled if number in texts]
    if len(worded) == 1 or len(set(map(key_of, map(table.title, worded)))) > 1:
        return [worded[0], *_surplus(table, worded[0])]
    if numbered:
        return numbered
    boolean = [number for number in others if _is_boolean(table, number)]
    if table.header and boolean and len(boolean) > (1 if titled else 0):
        return None
    if titled:
        return [titled[0], *_surplus(table, titled[0])]
    if len(texts) == 1:
        return [texts[0], *_surplus(table, texts[0])]
    if not texts and len(others) == 1:
        return list(others)
    lengths = {len(row) for _, row in table.rows}
    return texts if table.header is None and (len(lengths) > 1 or _share_words(table, texts)) else []


def _surplus(table: Table, column: int) -> list[int]:
    """Columns beyond the header's last if that is ``column``: unquoted tags that the delimiter separates."""
    longest = max((len(row) for _, row in table.rows), default=0)
    return list(range(table.width, longest)) if column == table.width - 1 else []


def _is_numeric(table: Table, number: int) -> bool:
    cells = [cell for cell in table.column(number) if cell]
    return all(_NUMBER.fullmatch(cell) for cell in cells)


def _is_boolean(table: Table, number: int) -> bool:
    return _truths(table, number) is not None


def _truths(table: Table, number: int) -> dict[str, bool] | None:
    """What each value in a class's column means; None if it is no such column. -1 means absent beside 1 alone."""
    values = {row[number].strip().casefold() if number < len(row) else "" for _, row in table.rows}
    if len(values) > 20 or not values - {""}:
        return {"": False} if values == {""} else None
    if {value.removesuffix(".0") for value in values} <= {"1", "-1"}:
        return {value: not value.startswith("-") for value in values}
    truths = {value: truth(value) for value in values}
    return None if None in truths.values() else {value: bool(present) for value, present in truths.items()}


def _is_split(table: Table, number: int) -> bool:
    return all(_SPLIT.fullmatch(cell.casefold()) for cell in table.column(number) if cell)


def _share_words(table: Table, columns: Sequence[int]) -> bool:
    """Whether columns without titles hold the same words, so that each row lists its tags in them."""
    cells = [{cell for cell in table.column(number) if cell} for number in columns]
    return len(cells) > 1 and all(words & set().union(*cells[:at], *cells[at + 1 :]) for at, words in enumerate(cells))


def _read_classes(table: Table, name: int, others: Sequence[int], out: Annotations) -> None:
    """Read a table with a column a class."""
    columns = {number: meaning for number in others if (meaning := _truths(table, number)) is not None}
    out.kind = f"CSV, a column a class (delimiter {DELIMITERS[table.delimiter]})"
    titles = {number: table.title(number) for number in columns}
    if unnamed := [number + 1 for number, title in titles.items() if not title]:
        out.fault("column of a class", f"column {unnamed[0]} has no title; name its class in the first line")
        return
    twice = [title for title, count in Counter(titles.values()).items() if count > 1]
    if twice:
        out.fault("column of a class", f"two columns are titled {twice[0]}; remove one")
    out.classes = list(titles.values())
    ignored = [table.title(number) or f"column {number + 1}" for number in others if number not in columns]
    if ignored:
        out.remarks.append(f"columns that are neither photos nor classes are not read: {_some(ignored)}")
    for line, row in table.rows:
        if reference := _reference(row, name, line, out):
            present = [
                titles[number]
                for number, meaning in columns.items()
                if meaning[row[number].strip().casefold() if number < len(row) else ""]
            ]
            out.add(reference, present)


def _read_tags(table: Table, name: int, columns: list[int], others: Sequence[int], out: Annotations) -> None:
    confidence = next((number for number in others if key_of(table.title(number)) == "confidence"), None)
    numeric = [number for number in others if number not in columns and _is_numeric(table, number)]
    adjacent = columns == list(range(columns[0], columns[0] + len(columns)))
    references: Counter[str] = Counter()
    for line, row in table.rows:
        if not (reference := _reference(row, name, line, out)):
            continue
        references[reference] += 1
        cells = [row[number].strip() for number in columns if number < len(row)]
        cells = [table.delimiter.join(cells)] if adjacent else cells  # tags that the delimiter separates need no quotes
        if confidence is not None and confidence < len(row) and row[confidence].strip() in ("0", "0.0"):
            cells = []  # Open Images: a person saw that the class is absent
        out.add(reference, [tag for cell in cells if cell.casefold() != "nan" for tag in as_field(cell)])
    several = any(count > 1 for count in references.values())
    form = "a row an object" if len(numeric) >= _BOXES else "a row a tag" if several else "a row an image"
    out.kind = f"CSV, {form} (delimiter {DELIMITERS[table.delimiter]})"


def _reference(row: Row, name: int, line: int, out: Annotations) -> str:
    reference = row[name].strip() if name < len(row) else ""
    if not reference:
        out.fault("row without a photo", f"line {line} names no photo; complete or remove it")
    return reference


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
