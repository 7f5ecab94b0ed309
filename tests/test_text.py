"""Texts become windows: cut for measuring, spread for calibrating; every bad text is named in one sentence."""

import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atomcli import text as text_module
from atomcli.errors import InputError
from atomcli.text import Text, calibration_windows, cut_windows, evaluation_windows, load_text, spread_windows, tokenize


class CharacterTokenizer:
    """Each character is its code point; a first token 1 when `bos`."""

    def __init__(self, bos: bool = False) -> None:
        self.bos = bos

    def __call__(self, content: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * self.bos + [ord(character) for character in content]}


def test_cut_windows_do_not_overlap_and_drop_the_tail() -> None:
    tokens = torch.arange(23)
    assert torch.equal(cut_windows(tokens, 5), torch.arange(20).reshape(4, 5))
    assert torch.equal(cut_windows(tokens, 5, limit=2), torch.arange(10).reshape(2, 5))


@pytest.mark.parametrize(
    ("length", "limit", "complaint"),
    [
        (24, None, "book has 23 tokens, fewer than one window of 24"),
        (5, 5, "book has 4 full windows of 5 tokens, 5 were asked for"),
        (1, None, "window of 1 tokens"),
        (5, 0, "0 windows were asked for"),
    ],
)
def test_cut_windows_refuses(length: int, limit: int | None, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        cut_windows(torch.arange(23), length, limit, "book")


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 500), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_spread_windows_are_distinct_pieces_of_the_text(samples: int, length: int, more: int, seed: int) -> None:
    half = (length + 1) // 2
    tokens = torch.arange(length + (samples - 1) * half + more)
    windows = spread_windows(tokens, samples, length, seed)
    assert windows.shape == (samples, length)
    assert torch.equal(windows, windows[:, :1] + torch.arange(length))  # contiguous
    starts = sorted(windows[:, 0].tolist())
    assert all(b - a >= half for a, b in pairwise(starts))  # overlap is half at most
    if len(tokens) >= samples * length:
        assert all(b - a >= length for a, b in pairwise(starts))
    assert torch.equal(windows, spread_windows(tokens, samples, length, seed))


def test_spread_windows_reach_over_the_whole_text_in_seeded_order() -> None:
    tokens = torch.arange(10_000)
    windows = spread_windows(tokens, 16, 100, seed=0)
    assert windows.max() > 9_000
    assert windows.min() < 1_000
    assert not torch.equal(windows, spread_windows(tokens, 16, 100, seed=1))
    assert windows[:, 0].tolist() != sorted(windows[:, 0].tolist())


def test_spread_windows_refuses_a_short_text_and_says_how_many_fit() -> None:
    with pytest.raises(InputError, match="book has 100 tokens; 4 samples of 50 need at least 125") as caught:
        spread_windows(torch.arange(100), 4, 50, 0, "book")
    assert caught.value.hint == "Ask for at most 3 samples"
    assert spread_windows(torch.arange(100), 3, 50, 0).shape == (3, 50)
    with pytest.raises(InputError, match="need at least 50"):
        spread_windows(torch.arange(49), 1, 50, 0)


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("höhe\r\n\n".encode())
    text = load_text(str(path), "held_out")
    assert text == Text(str(path), "höhe\r\n\n")
    assert tokenize(text, CharacterTokenizer(bos=True)).tolist()[:2] == [1, ord("h")]
    path.write_text("abcdefghij")
    assert evaluation_windows(str(path), CharacterTokenizer(), window=4).tolist() == [
        [ord(c) for c in "abcd"],
        [ord(c) for c in "efgh"],
    ]
    thirds = evaluation_windows(str(path), CharacterTokenizer(), window=2, limit=2, every=3)
    assert thirds.tolist() == [[ord(c) for c in "ab"], [ord(c) for c in "gh"]]
    with pytest.raises(InputError, match="has 5 full windows of 2 tokens"):
        evaluation_windows(str(path), CharacterTokenizer(), window=2, limit=3, every=3)
    assert calibration_windows(str(path), CharacterTokenizer(), samples=2, sequence_length=5, seed=0).shape == (2, 5)


def test_bad_files(tmp_path: Path) -> None:
    for content, complaint in (
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"abc\xff", "is not UTF-8 text: byte 3 is 0xff"),
    ):
        path = tmp_path / "bad.txt"
        path.write_bytes(content)
        with pytest.raises(InputError, match=complaint):
            load_text(str(path), "held_out")
    with pytest.raises(InputError, match="does not exist"):
        load_text(str(tmp_path / "absent.txt"), "held_out")
    with pytest.raises(InputError, match="is a directory"):
        load_text(str(tmp_path), "held_out")


def hub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]] | Exception) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any, **options: Any) -> list[dict[str, Any]]:
        calls.append((*args, options["split"], options["data_files"]))
        if isinstance(rows, Exception):
            raise rows
        return rows

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_named_sets_are_joined_as_papers_join_them(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub(monkeypatch, [{"text": "one"}, {"text": ""}, {"text": "two"}])
    assert load_text("wikitext2", "held_out").content == "one\n\n\n\ntwo"
    assert load_text("c4", "held_out").content == "one  two"
    assert load_text("wikitext2", "calibration", max_characters=2).content == "one"
    assert calls[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None)
    assert calls[2][2] == "train"


def test_hub_ids_name_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub(monkeypatch, [{"text": "one"}])
    load_text("owner/set", "held_out")
    load_text("owner/set:part", "calibration")
    load_text("owner/set:part:validation", "calibration")
    assert [call[:3] for call in calls] == [
        ("owner/set", None, "test"),
        ("owner/set", "part", "train"),
        ("owner/set", "part", "validation"),
    ]


def test_a_hub_that_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, ConnectionError("no route\nto host"))
    with pytest.raises(
        InputError, match=r"owner/set is no local file, and the Hub gave no data set of that name: no route$"
    ):
        load_text("owner/set", "held_out")
    hub(monkeypatch, [{"document": "x"}])
    with pytest.raises(InputError, match="has no text column; its columns are document"):
        load_text("owner/set", "held_out")
    hub(monkeypatch, [])
    with pytest.raises(InputError, match="owner/set is empty"):
        tokenize(load_text("owner/set", "held_out"), CharacterTokenizer())


def test_calibration_asks_for_no_more_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, [{"text": "x" * 100}] * 1000)
    seen: list[int] = []
    original = text_module.tokenize
    monkeypatch.setattr(
        text_module, "tokenize", lambda text, tok: seen.append(len(text.content)) or original(text, tok)
    )
    calibration_windows("owner/set", CharacterTokenizer(), samples=4, sequence_length=10, seed=0)
    assert seen[0] < 1000
