"""The runs of large shapes, small: every step is timed, and the same run makes the same files."""

import json
import re
import time

import pytest

from atomcli.benchmarks import large

ARGUMENTS = ("--divide", "8", "--samples", "2", "--tokens", "16")
STEPS = [("calibrate", "1"), ("calibrate", "2"), ("quantize", "1"), ("quantize", "2")]


def test_a_run_says_what_it_took(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ATOM_CACHE", str(tmp_path / "cache"))
    found = []
    for plan in ((), ("--plan",)):
        large.main(["llama-2-7b", "2", str(tmp_path), *ARGUMENTS, *plan])
        said, steps = capsys.readouterr()
        found.append(json.loads(said))
        assert re.findall(r"^(calibrate|quantize) (\d): \d+\.\d\d s$", steps, re.M) == STEPS
    first, again = found
    assert first["sha256"] == again["sha256"]
    assert {stage: len(steps) >= 2 for stage, steps in first["steps"].items()} == {
        "calibrate": True,
        "quantize": True,
        "verify": True,
    }
    assert sum(map(sum, first["steps"].values())) <= first["seconds"]
    assert first["host_bytes"] > 1 << 26
    assert again["plan"]["seconds"] > 0
    assert again["plan"]["disk_bytes"] == pytest.approx(again["disk_bytes"], rel=0.15)
    assert again["plan"]["host_bytes"] == pytest.approx(again["host_bytes"], rel=0.15)
    assert not (tmp_path / "out").exists()


def test_the_largest_size_is_kept_when_files_go(tmp_path):
    with large.largest_size(tmp_path, tmp_path / "absent", seconds=0.001) as seen:
        (tmp_path / "deeper").mkdir()
        (tmp_path / "deeper" / "file").write_bytes(bytes(5000))
        (tmp_path / "file").write_bytes(bytes(700))
        deadline = time.monotonic() + 30
        while seen.bytes < 5700 and time.monotonic() < deadline:
            time.sleep(0.001)
        (tmp_path / "file").unlink()
        time.sleep(0.01)
    assert seen.bytes == 5700
