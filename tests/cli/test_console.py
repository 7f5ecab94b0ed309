"""The sink: which stream, which colors, what JSON."""

import io
import json
import math
from pathlib import Path

import pytest

from atomcli.cli import console as module
from atomcli.cli.console import Console, Table
from atomcli.units import byte_count, duration


@pytest.fixture
def terminal(monkeypatch):
    """Every stream claims to be a terminal."""
    monkeypatch.setattr(module, "is_terminal", lambda stream: True)


def test_results_and_notes_go_to_different_streams(capsys):
    console = Console()
    console.result({}, "the result")
    console.note("a note")
    assert capsys.readouterr() == ("the result\n", "a note\n")


def test_quiet_keeps_results_warnings_and_errors(capsys):
    console = Console(quiet=True)
    console.note("a note")
    console.warn("careful")
    console.error("broken")
    console.result({}, "the result")
    assert capsys.readouterr() == ("the result\n", "warning: careful\nerror: broken.\n")


def test_json_is_one_document_even_with_numbers_json_lacks(capsys):
    console = Console(json=True)
    console.result({"a": math.nan, "b": [1, Path("x")], "c": {"d": -math.inf}}, "for people")
    console.error("a gate failed", kind="ThresholdError")
    console.finish()
    error = {"kind": "ThresholdError", "what": "a gate failed", "hint": None}
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1, "x"], "c": {"d": None}, "error": error}


def test_json_refuses_what_it_would_have_to_guess():
    with pytest.raises(TypeError, match="object"):
        Console(json=True).result({"a": object()})


def test_colors_only_on_a_terminal(capsys, terminal):
    Console().error("broken")
    assert "\x1b[31m" in capsys.readouterr().err
    Console(color=False).error("broken")
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("off", ["NO_COLOR", "--no-color"])
def test_colors_can_be_switched_off(off, atom, terminal, monkeypatch):
    assert "\x1b[" in atom("recipes", "list").out
    if off == "NO_COLOR":
        monkeypatch.setenv("NO_COLOR", "1")
    outcome = atom("recipes", "list", *([off] if off.startswith("--") else []))
    assert "\x1b[" not in outcome.out + outcome.err


def test_common_options_count_before_and_after_the_command(atom):
    assert atom("--json", "recipes", "list").out == atom("recipes", "list", "--json").out
    assert atom("-q", "recipes", "list").err == atom("recipes", "list", "-q").err == ""


def test_table_aligns_and_never_cuts():
    table = Table(["layer", ">bytes"])
    table.add("a" * 200, 7)
    table.add("b", 1234)
    assert table.lines() == ["layer" + " " * 197 + "bytes", "a" * 200 + "      7", "b" + " " * 202 + "1234"]


def test_a_closed_stdout_is_no_terminal():
    assert not module.is_terminal(io.StringIO())


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (98_400_000, "98.4 MB"), (140e9, "140.0 GB"), (2e12, "2.00 TB")]
)
def test_byte_count(count, text):
    assert byte_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
