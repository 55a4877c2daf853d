"""The report's tables as HTML. Numbers are percent with one decimal; wide tables scroll within their frame."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from pipeline.report.metrics import COLUMNS, STEPS, Chains, Metrics, best, supervision
from pipeline.report.published import Published

BADGES = {"full": "upper bound", "mixed": "uses masks", "weak": ""}
LEVEL = 9  # class names that fit beside each other; more are turned upright
ARROWS = {1: " ↑", -1: " ↓", 0: ""}


def table(head: str, body: Iterable[str], kind: str = "") -> str:
    """A table in its scrolling frame; ``head`` and ``body`` are rows of cells."""
    return (
        f'<div class="scroll"><table class="{kind}"><thead>{head}</thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def row_heading(row: str, chain: Mapping[str, str], method: str) -> str:
    """A row's name, with what it learned from where that is not tags alone."""
    badges = [BADGES[supervision(chain)], "selected" if row == method else ""]
    return f'<th scope="row">{escape(row)}{"".join(f"<small>{badge}</small>" for badge in badges if badge)}</th>'


def methods_table(metrics: Metrics, rows: Chains, method: str, spans: Mapping[str, str]) -> str:
    """Every row with every number. ``spans``: what each step was scored on, in words."""
    winners = best(metrics, rows)
    groups = titles = ""
    for step, title in STEPS.items():
        columns = [column for column in COLUMNS if column.step == step]
        words = f"{title}<small>{escape(spans[step])}</small>"
        groups += f'<th scope="colgroup" colspan="{len(columns)}" class="group">{words}</th>'
        for number, column in enumerate(columns):
            first = "" if number else ' class="first"'
            titles += f'<th scope="col"{first}>{column.title}{ARROWS[column.better]}</th>'
    body = []
    for row, chain in rows.items():
        cells = ""
        for number, column in enumerate(COLUMNS):
            first = "first" if number == 0 or COLUMNS[number - 1].step != column.step else ""
            value = metrics[row].get(column.key)
            shown = "–" if value is None else f"{100 * value:.1f}"
            strong = f"<b>{shown}</b>" if (row, column.key) in winners else shown
            cells += f'<td class="{first}">{strong}</td>'
        body.append(f'<tr class="{supervision(chain)}">{row_heading(row, chain, method)}{cells}</tr>')
    head = f'<tr><th rowspan="2" scope="col">Method</th>{groups}</tr><tr>{titles}</tr>'
    return table(head, body, "numbers")


def heat_table(corner: str, rows: Mapping[str, Mapping[str, float | None]], first: str, names: Sequence[str]) -> str:
    """Shares in [0, 1] by row and name, coloured by height. ``first``: heading of each row's mean, under the key ''."""
    head = f'<tr><th scope="col">{escape(corner)}</th><th scope="col">{escape(first)}</th>{_headings(names)}</tr>'
    body = []
    for row, values in rows.items():
        cells = "".join(_heat(values.get(name), 0.6 * (values.get(name) or 0.0), 1) for name in ("", *names))
        body.append(f'<tr><th scope="row">{escape(row)}</th>{cells}</tr>')
    return table(head, body, "numbers heat")


def confusion_table(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Where each class's pixels went: a row a ground-truth class, in percent of the row; nothing where below 0.5 %."""
    every = max(1, sum(map(sum, counts)))
    body = []
    for number, (name, row) in enumerate(zip(names, counts, strict=True)):
        pixels = sum(row)
        cells = f"<td>{100 * pixels / every:.1f}</td>"
        for column, count in enumerate(row):
            share = count / pixels if pixels else 0.0
            shown = share if share >= 0.005 else None
            cells += _heat(shown, 0.7 * share**0.5 if shown else 0.0, 0, "diagonal" if column == number else "", "")
        body.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    head = f'<tr><th scope="col">Mask ↓ Predicted →</th><th scope="col">share of all pixels</th>{_headings(names)}</tr>'
    return table(head, body, "numbers heat")


def words_table(rows: Mapping[str, Mapping[str, str]], corner: str) -> str:
    """Words by row and column."""
    columns = next(iter(rows.values()))
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in (corner, *columns))
    body = (
        f'<tr><th scope="row">{escape(row)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells.values())}</tr>'
        for row, cells in rows.items()
    )
    return table(f"<tr>{head}</tr>", body, "words")


def published_table(entries: Sequence[Published]) -> str:
    """What papers report: a row an entry, a number that a paper does not hold as a dash."""
    titles = ("Method", "Segmentation network", "Supervision", "val mIoU", "test mIoU", "Published in")
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    body = []
    for entry in entries:
        test = "–" if entry.test is None else f"{entry.test:.1f}"
        source = f"{entry.paper}, Table {entry.table}"
        cells = (entry.network, entry.supervision, f"{entry.val:.1f}", test, source)
        shown = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body.append(f'<tr><th scope="row">{escape(entry.method)}</th>{shown}</tr>')
    return table(f"<tr>{head}</tr>", body, "published")


def _headings(names: Sequence[str]) -> str:
    if len(names) <= LEVEL:
        return "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    return "".join(f'<th scope="col" class="class"><span>{escape(name)}</span></th>' for name in names)


def _heat(value: float | None, strength: float, digits: int, kind: str = "", missing: str = "–") -> str:
    shown = missing if value is None else f"{100 * value:.{digits}f}"
    colour = f' style="background:rgba(var(--heat),{strength:.2f})"' if strength > 0 else ""
    return f'<td class="{kind}"{colour}>{shown}</td>'
