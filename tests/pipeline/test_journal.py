"""The journal: what is published is there, what changed is said, and nobody else writes."""

import contextlib
from pathlib import Path

import pytest
import torch

from atomcli.errors import InputError, UsageError
from atomcli.pipeline.journal import LOCK, Journal, clear, differences, locked

IDENTITY = {"recipe": {"weights": {"clip": 0.85}}, "model": "a" * 64}


def test_steps_come_back_in_order(tmp_path):
    journal = Journal.open(tmp_path, IDENTITY)
    assert journal.steps == []
    journal.publish({"block": 0})
    journal.publish({"block": 1})
    assert [step["block"] for step in Journal.open(tmp_path, IDENTITY).steps] == [0, 1]


def test_a_new_journal_clears_what_a_crash_before_it_left(tmp_path):
    (tmp_path / "journal.json.tmp").write_text("x")
    with locked(tmp_path):
        Journal.open(tmp_path, IDENTITY)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["journal.json", LOCK]


@pytest.mark.parametrize("restart", [False, True])
def test_a_directory_that_no_run_made_is_left_alone(tmp_path, restart):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.tex").write_text("x")
    with locked(tmp_path), pytest.raises(UsageError, match="holds thesis, but no journal"):
        Journal.open(tmp_path, IDENTITY, restart=restart)
    assert (tmp_path / "thesis" / "draft.tex").read_text() == "x"


def test_emptying_takes_the_journal_last(tmp_path, monkeypatch):
    for name in ("a", "journal.json", "z"):
        (tmp_path / name).write_text("x")
    removed = []
    monkeypatch.setattr(Path, "unlink", lambda path: removed.append(path.name))
    clear(tmp_path)
    assert sorted(removed[:2]) == ["a", "z"]
    assert removed[2] == "journal.json"


def test_a_journal_of_a_published_directory_is_dropped(tmp_path):
    run = tmp_path / "out.unfinished"
    with locked(run):
        journal = Journal.open(run, {"model": "a"})
        journal.publish({"block": 0})
        with contextlib.suppress(KeyboardInterrupt), journal.aside():
            run.rename(tmp_path / "out")
            raise KeyboardInterrupt
    with locked(run):
        assert Journal.open(run, {"model": "a"}).steps == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.unfinished"]


def test_another_identity_is_refused_with_the_difference(tmp_path):
    Journal.open(tmp_path, IDENTITY).publish({"block": 0})
    changed = {"recipe": {"weights": {"clip": 0.9}}, "model": "b" * 64}
    with pytest.raises(UsageError, match=r"model was a{12}…, now b{12}…; recipe\.weights\.clip was 0\.85, now 0\.9"):
        Journal.open(tmp_path, changed)
    assert Journal.open(tmp_path, changed, restart=True).steps == []


def test_a_damaged_journal_is_an_error_not_a_fresh_start(tmp_path):
    Journal.open(tmp_path, IDENTITY)
    (tmp_path / "journal.json").write_text('{"version": 1,')
    with pytest.raises(InputError, match="journal"):
        Journal.open(tmp_path, IDENTITY)


def test_differences_name_every_value():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3, "d": None}, "e": [1]}) == [
        "a.c was 2, now 3",
        "e was null, now [1]",
    ]


def test_a_lock_ends_with_its_holder(tmp_path):
    with locked(tmp_path), pytest.raises(UsageError, match="Another atom"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_run_continues_with_the_threads_it_was_started_with(tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        Journal.open(tmp_path, IDENTITY)
        torch.set_num_threads(1)
        with Journal.open(tmp_path, IDENTITY).same_threads():
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
