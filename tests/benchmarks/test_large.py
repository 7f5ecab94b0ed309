"""The runs of large shapes, small: every step is timed, and the same run makes the same files."""

import json

from atomcli.benchmarks import large

ARGUMENTS = ("--divide", "8", "--samples", "2", "--tokens", "16")


def test_a_run_says_what_it_took(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ATOM_CACHE", str(tmp_path / "cache"))
    found = []
    for plan in ((), ("--plan",)):
        large.main(["llama-2-7b", "2", str(tmp_path), *ARGUMENTS, *plan])
        found.append(json.loads(capsys.readouterr().out))
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
    assert not (tmp_path / "out").exists()
