"""The page: sections of figures, tables and text, in one HTML file that needs nothing beside itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atomcli.reporting.figures import Figure


@dataclass(frozen=True)
class Grid:
    """A table: a header and rows of text; columns of numbers are aligned to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def numeric(self, column: int) -> bool:
        """Whether every cell of a column starts as a number does, or says that there is none."""
        cells = [row[column] for row in self.rows]
        return all(cell[:1] in "–-−" or cell[:1].isdigit() for cell in cells if cell) and any(cells)


@dataclass(frozen=True)
class Section:
    """A part of the page: what it shows, in words, plots, a table, and text that is shown as it is when opened."""

    title: str
    lead: str = ""
    figures: Sequence[Figure] = ()
    grid: Grid | None = None
    details: str = ""


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The HTML document. Every text is escaped; the plots are inline SVG; there is no script and no link."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("atomcli.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(title=title, subtitle=subtitle, sections=sections)


def save_figures(sections: Sequence[Section], directory: Path) -> list[Path]:
    """Every plot of the page as SVG and PNG in `directory`, which is made; the files written."""
    directory.mkdir(parents=True, exist_ok=True)
    return [path for section in sections for figure in section.figures for path in figure.save(directory)]
