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


@pytest.fixture
def snapshot(tmp_path: Path) -> Callable[[Outcome, str], None]:
    """Compares an outcome with tests/cli/snapshots/NAME.txt; UPDATE_SNAPSHOTS=1 writes the file instead."""

    def check(outcome: Outcome, name: str) -> None:
        text = f"$ atom {' '.join(outcome.arguments)}\nexit {outcome.code}\n"
        text += f"--- stdout\n{outcome.out}--- stderr\n{outcome.err}"
        text = text.replace(str(tmp_path), "<tmp>")
        for pattern, name_of_it in _CHANGING:
            text = pattern.sub(name_of_it, text)
        file = SNAPSHOTS / f"{name}.txt"
        if os.environ.get("UPDATE_SNAPSHOTS"):
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        assert file.is_file(), f"no snapshot {file}; write it with UPDATE_SNAPSHOTS=1"
        assert text == file.read_text(encoding="utf-8")

    return check
