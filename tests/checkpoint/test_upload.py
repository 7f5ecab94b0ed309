"""Pushing to a stand-in for the Hub: every byte arrives, and everything that can go wrong is a sentence."""

import pytest
from huggingface_hub import constants

from atomcli.checkpoint.upload import check_destination, push
from atomcli.errors import InputError, RunError, UsageError
from tests.helpers.hub import OWNER, TOKEN, stand_in

NAME = f"{OWNER}/small-w4a4"


@pytest.fixture
def hub(monkeypatch):
    with stand_in() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def test_a_directory_arrives_byte_by_byte_in_a_private_repository(hub, checkpoint):
    check_destination(NAME)
    page = push(checkpoint, NAME)
    assert page == f"{hub.url}/{NAME}"
    ours = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert {name: data for name, data in hub.repositories[NAME].items() if name != ".gitattributes"} == ours
    assert hub.private[NAME]


def test_one_file_arrives(hub, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    push(tmp_path / "model.gguf", NAME)
    assert hub.repositories[NAME]["model.gguf"] == b"GGUF" + bytes(100)


def test_an_empty_repository_of_ones_own_is_filled(hub, checkpoint):
    hub.repositories[NAME] = {".gitattributes": b""}
    check_destination(NAME)
    push(checkpoint, NAME)
    assert "config.json" in hub.repositories[NAME]


def test_what_is_wrong_is_said_before_anything_is_made(hub, monkeypatch):
    with pytest.raises(UsageError, match="write OWNER/NAME"):
        check_destination("small-w4a4")
    with pytest.raises(InputError, match="somebody may not push to somebody-else/model"):
        check_destination("somebody-else/model")
    check_destination("a-company/model")
    hub.repositories[NAME] = {".gitattributes": b"", "config.json": b"{}"}
    with pytest.raises(UsageError, match="is on the Hub already, with 1 files"):
        check_destination(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match="token"):
        check_destination(NAME)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(InputError, match="no token"):
        check_destination(NAME)
    assert set(hub.repositories) == {NAME}


@pytest.mark.parametrize(("status", "kind", "match"), [(403, InputError, "token"), (413, RunError, "refused")])
def test_an_upload_that_is_refused(hub, checkpoint, status, kind, match):
    hub.refuse = status
    with pytest.raises(kind, match=match):
        push(checkpoint, NAME)


def test_no_network(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(RunError, match="can't be reached"):
        check_destination(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="HF_HUB_OFFLINE"):
        check_destination(NAME)
