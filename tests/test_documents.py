"""Every code block of the README and the manual runs, in the order of its page, on a small model called `demo`.

A block that can't run everywhere says so in a comment on the line before it: `<!-- needs: gpu -->` (or vllm), or
`<!-- not run: why -->`. Its `atom` command lines are still read by the real parser, so no option is made up.
"""

import json
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml
from markdown_it import MarkdownIt

from atomcli import text
from atomcli.checkpoint import assets, gguf
from atomcli.checkpoint.directory import DirectorySource
from atomcli.checkpoint.gguf import GGUFSource
from atomcli.cli.app import app, run
from atomcli.cli.console import Console, console
from atomcli.recipe import load_recipe
from tests.helpers.bytes_model import write_bytes_model

ROOT = Path(__file__).parents[1]
# Measured tables and the log are records of what was run then, not instructions.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.is_file() and page.name != "kernel-log.md"]
ELSEWHERE = {"git", "cd", "pip"}  # what a reader does once, outside of what is tested
_MARK = re.compile(r"<!--\s*(needs|not run):\s*(.+?)\s*-->")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text and line on the page, and why it isn't run, if so."""

    language: str
    content: str
    line: int
    mark: str | None


def blocks_of(page: Path) -> Iterator[Block]:
    mark = None
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block" and (found := _MARK.search(token.content)):
            mark = ": ".join(found.groups())
        elif token.type == "fence":
            yield Block(token.info.strip(), token.content, (token.map or [0])[0] + 1, mark)
            mark = None


def commands_of(block: Block) -> Iterator[list[str]]:
    """The command lines of a shell block as words; MODEL, which stands for any model, is the demo model here."""
    for line in block.content.replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"\bMODEL\b", "demo", line), comments=True)
        if words:
            yield words


def check_options(words: list[str]) -> None:
    """Raises when the command line names a command, option or value that doesn't exist."""
    assert "--install-completion" not in words, "reading it would already do it"
    command = typer.main.get_command(app)
    with command.make_context("atom", words[1:]) as context:
        while hasattr(command, "resolve_command"):
            name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            context = command.make_context(name, rest, parent=context)


def execute(words: list[str]) -> None:
    """Runs one command line; `make` runs the atom commands of its target."""
    if words[0] == "make":
        lines = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for line in lines.splitlines():
            if "/atom " in line:
                execute(["atom", *shlex.split(line)[1:]])
    elif words[0] == "export":
        os.environ.update(word.split("=", 1) for word in words[1:])
    elif words[0] not in ELSEWHERE:
        assert words[0] == "atom", f"no test runs {words[0]!r}; mark the block with <!-- not run: why -->"
        words, target = (
            (words[: words.index(">")], words[words.index(">") + 1]) if ">" in words else (words, os.devnull)
        )
        vars(console).update(vars(Console()))
        with Path(target).open("w", encoding="utf-8") as out, redirect_stdout(out):
            code = run([os.path.expandvars(word) for word in words[1:]])
        assert code == 0, f"{shlex.join(words)} ended with {code}"


def check(block: Block) -> None:
    """Runs or reads one block, whatever its language asks for."""
    if block.language == "sh":
        for words in commands_of(block):
            if block.mark is None:
                execute(words)
            elif words[0] == "atom":
                check_options(words)
    elif block.mark is not None:
        return
    elif block.language == "python":
        exec(compile(block.content, f"line {block.line}", "exec"), {"__name__": "__main__"})
    elif block.language == "yaml":
        if "weights" in yaml.safe_load(block.content):
            file = Path("recipe-on-a-page.yaml")
            file.write_text(block.content)
            load_recipe(str(file))
    elif block.language == "json":
        json.loads(block.content)
    elif block.language == "toml":
        tomllib.loads(block.content)


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that every shipped recipe fits."""
    directory = tmp_path_factory.mktemp("models") / "demo"
    return write_bytes_model(directory, hidden_size=256, intermediate_size=384, max_position_embeddings=8192)


@pytest.fixture
def desk(small_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to work in, where `demo` is the small model and every measurement is a short one."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setenv("ATOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "demo_model", lambda: small_demo)
    monkeypatch.setattr(assets, "demo_text", lambda kind="calibration": ROOT / "LICENSE")
    monkeypatch.setattr(gguf, "GGUFSource", as_source)
    shorten(
        monkeypatch,
        "spread_windows",
        lambda tokens, samples, length, *rest: (tokens, min(samples, 4), min(length, 128), *rest),
    )
    shorten(
        monkeypatch,
        "cut_windows",
        lambda tokens, length, limit=None, *rest: (tokens, min(length, 256), min(limit or 2, 2), *rest),
    )
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def as_source(path: Path, name: str | None = None, real: type[GGUFSource] = GGUFSource) -> DirectorySource | GGUFSource:
    """The demo model, which is a directory here; a file that an export wrote is read as what it is."""
    return DirectorySource(path, name=name) if path.is_dir() else real(path, name)


def shorten(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[..., tuple[object, ...]]) -> None:
    real = getattr(text, name)
    monkeypatch.setattr(text, name, lambda *arguments: real(*change(*arguments)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_of_a_page_does_what_it_says(page: Path, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks_of(page):
        try:
            check(block)
        except (Exception, SystemExit) as error:
            raise AssertionError(
                f"{page.relative_to(ROOT)}:{block.line}: {error}\n{capsys.readouterr().err[-800:]}"
            ) from error


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"


def test_a_made_up_option_is_found() -> None:
    check_options(["atom", "eval", "kld", "x", "--max-kld", "0.3"])
    for wrong in (["atom", "eval", "kld", "x", "--max-kl", "0.3"], ["atom", "compress", "x"]):
        with pytest.raises(typer.exceptions.TyperException):
            check_options(wrong)


def test_the_manual_builds_without_a_warning(tmp_path: Path) -> None:
    """`make docs`: every page is in the table of contents, and every reference between pages resolves."""
    from sphinx.cmd.build import main

    assert main(["-W", "-q", "-b", "html", str(ROOT / "docs"), str(tmp_path / "html")]) == 0
    assert "Choosing a scheme" in (tmp_path / "html" / "index.html").read_text(encoding="utf-8")
