"""Progress: plain lines where nobody watches, a bar on a terminal, and results that stay clean beside it."""

import json
import os
import pty
import subprocess
import sys
import threading

import pytest

from atomcli.cli import console as console_module
from atomcli.cli import progress as module
from atomcli.cli.console import console
from atomcli.cli.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, "memory_text", lambda: "1.2 GB")

    def move(seconds: float) -> None:
        now[0] += seconds

    return move


def test_plain_lines_now_and_then(clock, capsys):
    with Progress() as progress:
        progress.begin("quantize", 30)
        for done in range(1, 31):
            clock(4)
            progress.advance(done, "error 0.0123")
        progress.end()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "quantize: block 4/30, error 0.0123, 16 s, 1 min 44 s left, 1.2 GB"
    assert lines[-1] == "quantize: 30 blocks in 2 min 00 s"
    assert len(lines) == 8


def test_a_resumed_run_predicts_from_its_own_steps(clock, capsys):
    with Progress() as progress:
        progress.begin("quantize", 30)
        progress.advance(20)
        clock(20)
        progress.advance(21)
    assert capsys.readouterr().err == "quantize: block 21/30, 20 s, 3 min 00 s left, 1.2 GB\n"


def test_a_counter_begins_and_ends_its_stage(clock, capsys):
    with Progress() as progress:
        seen = progress.counter("parent", "window")
        clock(1)
        seen(1, 2)
        clock(1)
        seen(2, 2)
    assert capsys.readouterr().err == "parent: 2 windows in 1 s\n"


def test_quiet_says_nothing(clock, capsys, monkeypatch):
    monkeypatch.setattr(console, "quiet", True)
    with Progress() as progress:
        progress.begin("quantize", 2)
        clock(60)
        progress.advance(1)
        progress.end()
    assert capsys.readouterr() == ("", "")


def test_a_bar_is_taken_away_when_the_work_fails(clock, monkeypatch, capsys):
    monkeypatch.setattr(console_module, "is_terminal", lambda stream: True)

    def fail() -> None:
        with Progress() as progress:
            progress.begin("quantize", 2)
            assert console.screen is not None
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert console.screen is None


def test_on_a_terminal_the_bar_is_on_stderr_and_json_stays_clean(tiny_model, text_file):
    command = ["eval", "ppl", tiny_model, "--data", text_file, "--window-length", "64", "--windows", "3", "--json"]
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # Linux: the other side is closed
                return
            if not piece:
                return
            shown.extend(piece)

    reader = threading.Thread(target=read)
    reader.start()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-m", "atomcli", *map(str, command)], stdout=subprocess.PIPE, stderr=theirs, env=environment
    )
    os.close(theirs)
    reader.join()
    os.close(ours)
    assert done.returncode == 0
    assert json.loads(done.stdout)["models"][0]["windows"] == 3
    assert b"token perplexity" in shown
    assert b"\x1b[" in shown
