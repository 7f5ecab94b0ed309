"""The journal: what is published is there, what changed is said, and nobody else writes."""

import contextlib

import pytest
import torch

from atomcli.errors import InputError, UsageError
from atomcli.pipeline.journal import LOCK, Journal, differences, locked

IDENTITY = {"recipe": {"weights": {"clip": 0.85}}, "model": "a" * 64}


def test_steps_come_back_in_order(tmp_path):
    journal = Journal.open(tmp_path, IDENTITY)
    assert journal.steps == []
    journal.publish({"block": 0})
    journal.publish({"block": 1})
    assert [step["block"] for step in Journal.open(tmp_path, IDENTITY).steps] == [0, 1]


def test_a_new_journal_clears_what_no_journal_mentions(tmp_path):
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "over").write_text("x")
    (tmp_path / "model-00001.safetensors.tmp").write_text("x")
    with locked(tmp_path):
        Journal.open(tmp_path, IDENTITY)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["journal.json", LOCK]


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
    with locked(tmp_path), pytest.raises(UsageError, match="another atom"), locked(tmp_path):
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
