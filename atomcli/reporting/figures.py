"""Plots that live in a page and on disk: drawn by matplotlib, colored by the page's theme or by a fixed palette."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 5.2, 3.0  # inches: at the width of a phone the text keeps its size


@dataclass(frozen=True)
class Palette:
    """The colors of a plot: text and axes, grid lines, the background, and the series in their order."""

    ink: str
    grid: str
    surface: str
    series: tuple[str, ...]


# Wong's colors, which people with any color vision tell apart; they stand out on white and on near-black alike.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
PAPER = Palette("#1f2328", "#d0d7de", "#ffffff", SERIES)
# Colors that stand for the page's variables: the drawing is made once, and the theme decides how it looks.
_VARIABLES = {"#010203": "var(--ink)", "#010204": "var(--line)", "#010205": "var(--surface)"}
_PAGE = Palette("#010203", "#010204", "#010205", SERIES)


@dataclass(frozen=True)
class Figure:
    """A plot: its name (a file's stem), what it shows in one sentence, and how it is drawn with a palette."""

    name: str
    caption: str
    draw: Callable[[Palette], Any]

    def inline(self) -> str:
        """The plot as an SVG element for a page that defines --ink, --line and --surface."""
        svg = self._svg(_PAGE)
        svg = svg[svg.index("<svg") :]
        for color, variable in _VARIABLES.items():
            svg = svg.replace(color, variable)
        # The page sets the size; names of parts that nothing refers to would only collide with other plots' names.
        svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
        svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
        used = set(re.findall(r"#([\w-]+)", svg))
        return re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", svg)

    def save(self, directory: Path) -> list[Path]:
        """Write NAME.svg and NAME.png into `directory`, which exists; the files written."""
        svg, png = directory / f"{self.name}.svg", directory / f"{self.name}.png"
        svg.write_text(self._svg(PAPER), encoding="utf-8")
        with _style(self.name, PAPER):
            self.draw(PAPER).savefig(png, dpi=200, metadata={"Software": None})
        return [svg, png]

    def _svg(self, palette: Palette) -> str:
        out = io.StringIO()
        with _style(self.name, palette):
            self.draw(palette).savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        return out.getvalue()


def axes(title_x: str, title_y: str, height: float = HEIGHT) -> tuple[Any, Any]:
    """A new plot with one pair of axes, and their titles; call it inside `Figure.draw`."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
    plot = canvas.subplots()
    plot.set_xlabel(title_x)
    plot.set_ylabel(title_y)
    plot.grid(visible=True)
    return canvas, plot


def _style(name: str, palette: Palette) -> Any:
    """Colors, fonts and reproducible names of parts, as matplotlib's settings."""
    import matplotlib
    from cycler import cycler

    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": name,
            "font.family": "sans-serif",
            "font.size": 9,
            "axes.prop_cycle": cycler(color=palette.series),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "grid.linewidth": 0.6,
            "lines.markersize": 4,
            "grid.color": palette.grid,
            "figure.facecolor": palette.surface,
            "savefig.facecolor": palette.surface,
            "axes.facecolor": palette.surface,
            **{f"{part}.color": palette.ink for part in ("text", "xtick", "ytick")},
            "axes.edgecolor": palette.ink,
            "axes.labelcolor": palette.ink,
        }
    )
