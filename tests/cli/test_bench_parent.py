"""`atom bench parent`: a model directory that the other commands take."""

import json


def test_a_made_up_model_can_be_planned(atom, tmp_path):
    made = atom("bench", "parent", "mixtral-8x7b", "--blocks", 1, "--divide", 32, "-o", tmp_path / "model", "--json")
    assert made.code == 0, made.err
    assert json.loads(made.out)["config"]["num_hidden_layers"] == 1
    planned = atom("plan", tmp_path / "model", "--group", 16, "--outliers", 16, "--json")
    assert planned.code == 0, planned.err
    assert len(json.loads(planned.out)["linears"]) == 4 + 8 * 3


def test_a_shape_that_is_none_is_refused(atom, tmp_path):
    outcome = atom("bench", "parent", "llama-9", "-o", tmp_path / "model")
    assert outcome.code == 2
    assert "llama-9 is no shape that can be made" in outcome.err
    assert not (tmp_path / "model").exists()
