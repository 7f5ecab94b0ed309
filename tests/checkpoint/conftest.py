"""Fixtures of the checkpoint's tests: an own cache, tiny models and a finished checkpoint."""

from pathlib import Path

import pytest

from tests.helpers.checkpoints import write_checkpoint, write_model


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, so that nothing a user keeps is read or touched."""
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ATOM_CACHE", str(directory))
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_model(tmp_path / "sharded", sharded=True)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "out")
