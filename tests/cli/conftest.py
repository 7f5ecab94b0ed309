"""Runs command lines in this process and pins what they print."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from atomcli.cli.app import run
from atomcli.cli.console import Console, console

SNAPSHOTS = Path(__file__).parent / "snapshots"
_CHANGING = [
    (re.compile(r"\d+ h \d+ min|\d+ min \d+ s|\b\d+ s\b"), "<time>"),
    (re.compile(r"\S*/logs/\S+\.log"), "<log>"),
    (re.compile(r"\b\d\.\d{3}e[-+]\d\d\b"), "<error>"),
]


@dataclass(frozen=True)
class Outcome:
    """What a command line did: its exit code and what it wrote where."""

    arguments: tuple[str, ...]
    code: int
    out: str
    err: str


@pytest.fixture
def atom(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Calls `atom ARGUMENTS` in a terminal-less, uncolored, 100 columns wide world."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def call(*arguments: object) -> Outcome:
        vars(console).update(vars(Console()))
        capsys.readouterr()
        words = tuple(map(str, arguments))
        code = run(words)
        captured = capsys.readouterr()
        return Outcome(words, code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 11,000 characters of English."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text((Path(__file__).parents[2] / "LICENSE").read_text())
    return file


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory as one finds them."""
    from tests.helpers.bytes_model import write_bytes_model

    return write_bytes_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def quantize_options(text_file: Path) -> list[object]:
    """What makes a shipped recipe fit the tiny model."""
    settings = {"--dataset": text_file, "--samples": 4, "--sequence-length": 64, "--outliers": 16, "--group": 32}
    return [word for setting in settings.items() for word in setting]


@pytest.fixture
def tiny_checkpoint(
    tiny_model: Path, quantize_options: list[object], atom: Callable[..., Outcome], tmp_path: Path
) -> Path:
    """The tiny model, compressed by the command line."""
    out = tmp_path / "tiny-w4a4"
    assert atom("quantize", tiny_model, "-o", out, *quantize_options).code == 0
    return out


@pytest.fixture
def snapshot(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Outcome, str], None]:
    """Compares an outcome with tests/cli/snapshots/NAME.txt; UPDATE_SNAPSHOTS=1 writes the file instead."""

    def check(outcome: Outcome, name: str) -> None:
        text = f"$ atom {' '.join(outcome.arguments)}\nexit {outcome.code}\n"
        text += f"--- stdout\n{outcome.out}--- stderr\n{outcome.err}"
        text = text.replace(str(tmp_path), "<tmp>")
        text = re.sub(re.escape(str(tmp_path_factory.getbasetemp())) + r"/[a-z]+0/", "<tmp>/", text)
        for pattern, name_of_it in _CHANGING:
            text = pattern.sub(name_of_it, text)
        file = SNAPSHOTS / f"{name}.txt"
        if os.environ.get("UPDATE_SNAPSHOTS"):
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        assert file.is_file(), f"no snapshot {file}; write it with UPDATE_SNAPSHOTS=1"
        assert text == file.read_text(encoding="utf-8")

    return check
