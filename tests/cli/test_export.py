"""`atom export` and `--push` from the shell, on a model of two layers."""

import json

import pytest
from huggingface_hub import constants

from tests.helpers.hub import OWNER, TOKEN, stand_in


@pytest.fixture
def plain_options(text_file):
    settings = {"--recipe": "w4a16-plain", "--dataset": text_file, "--samples": 4, "--sequence-length": 64}
    return [word for setting in (settings | {"--group": 32, "--rounding": "rtn"}).items() for word in setting]


@pytest.fixture
def plain(atom, tiny_model, plain_options, tmp_path):
    assert atom("quantize", tiny_model, "-o", tmp_path / "plain", *plain_options).code == 0
    return tmp_path / "plain"


@pytest.fixture
def hub(monkeypatch):
    with stand_in() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def test_a_plain_checkpoint_is_exported_without_loss(atom, plain, tmp_path, snapshot):
    outcome = atom("export", plain, "--to", "compressed-tensors", "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    snapshot(outcome, "export")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    again = atom("export", plain, "--to", "compressed-tensors", "-o", tmp_path / "out")
    assert again.code == 2
    assert "not empty" in again.err


def test_a_dry_run_writes_nothing(atom, plain, tiny_model, plain_options, tmp_path, snapshot):
    before = sorted(tmp_path.iterdir())
    outcome = atom("export", plain, "--to", "gguf", "-o", tmp_path / "out.gguf", "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["linears"] == {"Q4_0": 14}
    outcome = atom("quantize", tiny_model, "-o", tmp_path / "other", *plain_options, "--dry-run")
    assert outcome.code == 0, outcome.err
    snapshot(outcome, "quantize-dry-run")
    assert sorted(tmp_path.iterdir()) == before


def test_what_needs_a_trade_is_refused_with_the_options(atom, tiny_checkpoint, text_file, tmp_path, snapshot):
    command = ["export", tiny_checkpoint, "--to", "compressed-tensors", "-o", tmp_path / "out"]
    outcome = atom(*command)
    assert outcome.code == 2
    snapshot(outcome, "export-refused")
    trades = [word for word in outcome.err.split() if word == "--trade" or "=" in word]
    outcome = atom(*command, *trades, "--data", text_file, "--windows", 1, "--json")
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    assert document["cost"]["export_from_checkpoint"] > 0
    assert {each["what"] for each in document["traded"]} == {"outliers", "order", "transform", "cache"}


def test_a_trade_that_there_is_not(atom, tiny_checkpoint, snapshot):
    snapshot(atom("export", tiny_checkpoint, "--to", "gguf", "--trade", "outlier=drop"), "export-trade")


def test_pushed_when_it_is_finished(atom, hub, plain, tiny_model, plain_options, tmp_path):
    name = f"{OWNER}/tiny"
    outcome = atom("export", plain, "--to", "compressed-tensors", "-o", tmp_path / "out", "--push", name)
    assert outcome.code == 0, outcome.err
    assert f"pushed to {hub.url}/{name}" in outcome.out
    assert "model-00001.safetensors" in hub.repositories[name]
    outcome = atom("quantize", tiny_model, "-o", tmp_path / "more", *plain_options, "--push", name)
    assert outcome.code == 2
    assert "is on the Hub already" in outcome.err
    assert not (tmp_path / "more").exists()


def test_eval_writes_into_the_card_and_the_checkpoint_stays_whole(atom, plain, tiny_model, text_file):
    measure = ["--data", text_file, "--window-length", 64, "--windows", 2]
    assert atom("eval", "kld", plain, "--against", tiny_model, *measure, "--card").code == 0
    assert "## Measured" in (plain / "README.md").read_text()
    assert atom("inspect", plain, "--verify").code == 0
