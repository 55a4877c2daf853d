"""Rendering of the report as one self-contained HTML file, with one template in ``templates/`` per section."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"
# Strings are escaped in text, attributes and SVG; an undefined name in a template raises UndefinedError.
ENVIRONMENT = Environment(
    loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


@dataclass(frozen=True)
class Section:
    """A section of the page: ``template`` renders ``content`` under ``heading``. Empty sections are omitted."""

    heading: str
    template: str  # file name in templates/
    content: Mapping[str, Any]

    @property
    def anchor(self) -> str:
        """The HTML id to which the navigation bar links."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.heading.lower())


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Render the HTML document, with an inlined style sheet and a navigation bar."""
    kept = [section for section in sections if section.content]
    return ENVIRONMENT.get_template("page.html.j2").render(title=title, lead=lead, sections=kept)
