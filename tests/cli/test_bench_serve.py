"""`atom bench serve` against a stand-in for vLLM's server."""

import json
from pathlib import Path

from tests.helpers import fake_vllm


def test_peers_come_first_and_keep_their_options(atom, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(fake_vllm.install(tmp_path / "path")))
    model = fake_vllm.model(tmp_path / "model")
    options = ["--requests", 6, "--scale", 0.02, "--peer", f"alone={model} --max-num-seqs 1", "--json"]
    outcome = atom("bench", "serve", model, *options)
    assert outcome.code == 0, outcome.err
    rows = json.loads(outcome.out)["rows"]
    assert [row["labels"]["model"] for row in rows] == ["alone", str(model)]
    assert rows[0]["extra"]["options"] == "--max-num-seqs 1"


def test_what_it_cannot_read_is_said(atom) -> None:
    for wrong in (["--peer", "nothing"], ["--scale", 3], ["--requests", 0]):
        outcome = atom("bench", "serve", "model", *wrong)
        assert outcome.code == 2, outcome.err
