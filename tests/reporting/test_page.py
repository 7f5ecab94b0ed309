"""A page stands alone: nothing is fetched, nothing runs, nothing that a name contains becomes markup."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from atomcli.reporting.figures import PAPER, Figure, Palette, axes
from atomcli.reporting.page import Grid, Section, page, save_figures

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "link", "br", "img", "input", "hr"}


def line(palette: Palette) -> object:
    canvas, plot = axes("x", "y")
    plot.plot([1, 2, 3], [2, 1, 3], label="a line")
    plot.legend()
    return canvas


SECTIONS = [
    Section("Numbers", "What <b>was</b> measured & how.", [Figure("line", "A line.", line)]),
    Section("Table", grid=Grid(["name", "value"], [["<script>alert(1)</script>", "1.5"], ["b", "–"]])),
    Section("Long", grid=Grid(["layer"] * 9, [["model.layers.0.self_attn.q_proj"] * 9]), details="a: 1\nb: 2"),
]


class Tags(HTMLParser):
    """Checks that tags are closed in order, and keeps their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def html() -> str:
    return page("atom eval <kld>", "atom 1", SECTIONS)


def test_tags_are_closed_in_order_and_ids_are_unique(html: str) -> None:
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    ids = [attributes["id"] for _, attributes in tags.seen if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_nothing_is_fetched_and_nothing_runs(html: str) -> None:
    tags = Tags()
    tags.feed(html)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags.seen}
    for _, attributes in tags.seen:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_text_is_escaped(html: str) -> None:
    assert "&lt;script&gt;alert(1)" in html
    assert "atom eval &lt;kld&gt;" in html


def test_a_plot_takes_the_colors_of_the_page(html: str) -> None:
    svg = html[html.index("<svg") : html.index("</svg>")]
    assert "var(--ink)" in svg
    assert "#0102" not in svg


def test_plots_on_disk_have_colors_of_their_own_and_are_reproducible(tmp_path: Path) -> None:
    files = save_figures(SECTIONS, tmp_path / "plots")
    assert [file.name for file in files] == ["line.svg", "line.png"]
    svg = files[0].read_text()
    assert PAPER.ink in svg
    assert "var(" not in svg
    assert files[1].read_bytes().startswith(b"\x89PNG")
    before = [file.read_bytes() for file in files]
    assert [file.read_bytes() for file in save_figures(SECTIONS, tmp_path / "plots")] == before


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_it_without_scrolling_sideways(html: str, tmp_path: Path, width: int) -> None:
    probe = (
        "<script>const e = document.documentElement;"
        "e.dataset.scroll = e.scrollWidth; e.dataset.client = e.clientWidth;"
        "e.dataset.plot = Math.round(document.querySelector('figure svg').getBoundingClientRect().width)</script>"
    )
    # The narrowest window of headless Chromium is 500 pixels wide, so a frame of the wanted width holds the page.
    (tmp_path / "page.html").write_text(html.replace("</body>", f"{probe}</body>"))
    frame = f'<iframe src="page.html" width="{width}" height="800" style="border:0"></iframe>'
    (tmp_path / "frame.html").write_text(
        f"<body>{frame}<script>onload = () => {{ const d = frames[0].document.documentElement.dataset;"
        "document.body.textContent = [d.scroll, d.client, d.plot].join(' ') }</script></body>"
    )
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --hide-scrollbars --disable-sync"
    flags += " --disable-background-networking"
    run = subprocess.run(
        [
            str(CHROMIUM),
            *flags.split(),
            "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1300,900",
            "--virtual-time-budget=5000",
            "--dump-dom",
            (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = re.search(r"<body>(\d+) (\d+) (\d+)</body>", run.stdout)
    assert found, run.stdout
    scroll, client, plot = map(int, found.groups())
    assert client == width
    assert scroll <= client
    assert 0.8 * min(width, 640) < plot <= width
