"""The project's documents: their commands, links and examples."""

import re
from pathlib import Path
from typing import NamedTuple

from tests.project import ROOT

DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/*.md", "data/README.md", "benchmarks/README.md")
    for path in ROOT.glob(pattern)
)
PROGRAMS = {
    ".",
    "docker",
    "dvc",
    "find",
    "git",
    "make",
    "pip",
    "python",
    "snakemake",
    "wsss",
}  # that commands start with
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)


class Fence(NamedTuple):
    """A fenced block of a document."""

    document: Path
    language: str
    text: str


def fences() -> list[Fence]:
    return [Fence(path, *found) for path in DOCUMENTS for found in _FENCE.findall((ROOT / path).read_text())]


def spans(document: Path) -> list[str]:
    """Inline code, with line breaks folded; in a table, a pipe is written with a backslash."""
    prose = _FENCE.sub("", (ROOT / document).read_text())
    return [" ".join(text.split()).replace("\\|", "|") for _, text in _SPAN.findall(prose)]


def commands() -> dict[str, list[Path]]:
    """Every command in the documents, and the documents that have it.

    Commands are the lines of fences in ``sh``, without comments; what follows 'for:' in a comment of other fences; and
    inline code of several words that starts with a program.
    """
    found: dict[str, list[Path]] = {}
    for fence in fences():
        lines = fence.text.splitlines()
        if fence.language == "sh":
            texts = [re.sub(r"(^|\s+)# .*", "", line).strip() for line in lines]
        else:
            texts = [match[1] for line in lines if (match := re.search(r"# .*\bfor: (.*)", line))]
        for text in filter(None, texts):
            found.setdefault(text, []).append(fence.document)
    for document in DOCUMENTS:
        for text in spans(document):
            words = text.split()
            if len(words) > 1 and words[0] in PROGRAMS:
                found.setdefault(text, []).append(document)
    return found


def headings(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub names them."""
    anchors: list[str] = []
    for title in re.findall(r"^#+ +(.*)$", _FENCE.sub("", (ROOT / document).read_text()), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        repeated = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", other) is not None for other in anchors)
        anchors.append(f"{anchor}-{repeated}" if repeated else anchor)
    return set(anchors)


def links(document: Path) -> list[str]:
    """The targets of a document's links and pictures."""
    prose = _FENCE.sub("", (ROOT / document).read_text())
    without_code = _SPAN.sub("", prose)
    return re.findall(r"\]\(([^)\s]+)\)", without_code)
