"""The report's page: templates in ``templates/`` lay out the data of its sections in one self-contained HTML file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"
# Every string is escaped, in text, attributes and SVG alike; a name that a template misspells raises UndefinedError.
ENVIRONMENT = Environment(
    loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


@dataclass(frozen=True)
class Section:
    """A section of the page: ``template`` lays out ``content`` under ``heading``. Empty content omits the section."""

    heading: str
    template: str  # file name in templates/
    content: Mapping[str, Any]

    @property
    def anchor(self) -> str:
        """The id that the navigation links to."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.heading.lower())


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole HTML document, with the style sheet inlined and a navigation bar that lists its sections."""
    kept = [section for section in sections if section.content]
    return ENVIRONMENT.get_template("page.html.j2").render(title=title, lead=lead, sections=kept)
