"""`atom bench accuracy`: one command, a table, a document; a peer that isn't there is a row."""

import json

import pytest


@pytest.fixture
def words(tiny_model, text_file, tmp_path):
    text = ["--data", text_file, "--windows", 2, "--window-length", 64, "--dataset", text_file, "--samples", 2]
    small = ["--sequence-length", 64, "--group", 32, "--kv-cache", "none", "--recipe", "w8a8", "-o", tmp_path / "out"]
    return ["bench", "accuracy", tiny_model, *text, *small, "--peer", "llmcompressor/gptq-w4a16"]


def test_rows_are_kept_and_a_missing_peer_says_why(atom, words):
    outcome = atom(*words)
    assert outcome.code == 0, outcome.err
    header, _, *lines = outcome.out.splitlines()
    assert [title.split("(")[0].strip() for title in header.split("|")[1:-1]][:3] == ["class", "method", "by"]
    assert [line.split("|")[1].strip() for line in lines] == ["W16A16", "W4A16", "W8A8"]
    assert "Not measured: No environment of llmcompressor was given" in lines[1]
    again = atom(*words, "--json")
    assert "quantize" not in again.err
    rows = json.loads(again.out)["rows"]
    assert [row["measures"]["KLD"] is None for row in rows] == [True, True, False]
    assert len(rows[2]["extra"]["text"]["window_kld"]) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--peer", "llmcompressor/gptq-w4a61"], "Did you mean llmcompressor/gptq-w4a16?"),
        (["--peer-python", "llmcompressor"], "write NAME=PATH"),
        (["--group", 100], "--group is 100"),
        (["--limit", 0], "--limit"),
    ],
)
def test_what_is_mistyped_is_found_before_anything_is_read(atom, words, more, said, tmp_path):
    outcome = atom(*words, *more)
    assert outcome.code == 2
    assert said in outcome.err
    assert not (tmp_path / "out").exists()
