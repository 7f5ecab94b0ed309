"""The whole way from the shell, on a model of two layers: quantize, calibrate, inspect, eval, bench."""

import json
import logging
import shlex
import shutil
from pathlib import Path

import pytest

from atomcli.cli.options import default_output
from atomcli.pipeline import road
from tests.helpers.bytes_model import write_bytes_model


def test_quantize_ends_with_the_commands_one_wants_next(atom, tiny_model, quantize_options, tmp_path, snapshot):
    outcome = atom("quantize", tiny_model, "-o", tmp_path / "out", *quantize_options)
    assert outcome.code == 0
    snapshot(outcome, "quantize")


def test_quantize_as_json(atom, tiny_model, quantize_options, tmp_path):
    outcome = atom("quantize", tiny_model, "-o", tmp_path / "out", *quantize_options, "--json", "--quiet")
    document = json.loads(outcome.out)
    assert outcome.err == ""
    assert document["layers"] == 14
    assert document["report"]["recipe"]["weights"]["group"] == 32
    assert 4 < document["bits_per_weight"] < 8


def test_quantize_writes_a_log(atom, tiny_model, quantize_options, tmp_path, monkeypatch):
    monkeypatch.setenv("ATOM_CACHE", str(tmp_path / "cache"))
    before = list(logging.getLogger("atomcli").handlers)
    assert atom("quantize", tiny_model, "-o", tmp_path / "out", *quantize_options).code == 0
    (log,) = (tmp_path / "cache" / "logs").glob("*-quantize-*.log")
    assert "command line" in log.read_text()
    assert logging.getLogger("atomcli").handlers == before


def test_a_finished_checkpoint_is_replaced_only_when_told(
    atom, tiny_model, tiny_checkpoint, quantize_options, snapshot
):
    again = ["quantize", tiny_model, "-o", tiny_checkpoint, *quantize_options]
    outcome = atom(*again)
    assert outcome.code == 2
    snapshot(outcome, "quantize-finished")
    assert atom(*again, "--rounding", "rtn", "--force").code == 0
    report = json.loads(atom("inspect", tiny_checkpoint, "--json").out)
    assert report["recipe"]["weights"]["rounding"] == "rtn"


def test_interrupted_it_says_so_and_resumes(atom, tiny_model, quantize_options, tmp_path, monkeypatch, snapshot):
    command = ["quantize", tiny_model, "-o", tmp_path / "out", *quantize_options]
    real = road.write_shard

    def interrupted(directory, file, tensors):
        if file == "model-00002.safetensors":
            raise KeyboardInterrupt
        return real(directory, file, tensors)

    monkeypatch.setattr(road, "write_shard", interrupted)
    outcome = atom(*command)
    assert outcome.code == 130
    snapshot(outcome, "quantize-interrupted")
    assert not (tmp_path / "out").exists()

    monkeypatch.setattr(road, "write_shard", real)
    outcome = atom(*command)
    assert outcome.code == 0
    assert "continuing after block 1 of 2" in outcome.err


def test_calibrate_once_then_quantize(atom, tiny_model, quantize_options, tmp_path):
    text = quantize_options[:6]
    outcome = atom("calibrate", tiny_model, "-o", tmp_path / "calibration", *text)
    assert outcome.code == 0
    (next_command,) = [line for line in outcome.err.splitlines() if line.startswith("next: atom quantize")]
    again = atom("quantize", *shlex.split(next_command)[3:], "-o", tmp_path / "a", *quantize_options[6:])
    assert again.code == 0, again.err
    assert "warning" not in again.err
    assert atom("quantize", tiny_model, "-o", tmp_path / "b", *quantize_options).code == 0
    for shard in (tmp_path / "a").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "b" / shard.name).read_bytes()


def test_inspect(atom, tiny_checkpoint, snapshot):
    outcome = atom("inspect", tiny_checkpoint, "--verify")
    assert outcome.code == 0
    snapshot(outcome, "inspect")


def test_bits_per_weight_are_those_of_the_files(atom, tiny_checkpoint):
    document = json.loads(atom("inspect", tiny_checkpoint, "--json").out)
    blocks = [file for file in tiny_checkpoint.glob("*.safetensors") if file.name != "model-00000.safetensors"]
    kept = sum(size for name, size in document["kept"].items() if name.startswith("model.layers."))
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in blocks)
    measured = 8 * (sum(file.stat().st_size for file in blocks) - headers - kept) / document["quantized_parameters"]
    assert document["bits_per_weight"] == pytest.approx(measured)


def test_inspect_finds_a_flipped_bit(atom, tiny_checkpoint):
    shard = tiny_checkpoint / "model-00001.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    outcome = atom("inspect", tiny_checkpoint, "--verify")
    assert outcome.code == 1
    assert "model-00001.safetensors" in outcome.err
    assert outcome.out == ""


def test_eval_kld_beside_the_parent_that_the_checkpoint_names(atom, tiny_checkpoint, text_file):
    outcome = atom("eval", "kld", tiny_checkpoint, "--data", text_file, "--window-length", 64, "--windows", 3)
    assert outcome.code == 0, outcome.err
    for line in ("token perplexity", "mean KLD (nats)", "same top token", "weight bytes", "bits per weight"):
        assert any(each.startswith(line) for each in outcome.out.splitlines())
    assert "3 windows of 64 tokens" in outcome.out


def test_eval_kld_says_when_it_is_given_another_parent(atom, tiny_model, tiny_checkpoint, text_file, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    measure = ["--data", text_file, "--window-length", 16, "--windows", 1, "--quiet"]
    for parent, warnings in ((tiny_model, 0), (tmp_path / "other", 1), (tiny_checkpoint, 1)):
        outcome = atom("eval", "kld", tiny_checkpoint, "--against", parent, *measure)
        assert outcome.code == 0, outcome.err
        assert outcome.err.count("\n") == outcome.err.count("warning:") == warnings
        assert (f"{parent} is not the parent of {tiny_checkpoint}" in outcome.err) == bool(warnings)


def test_eval_gates(atom, tiny_model, tiny_checkpoint, text_file):
    measure = ["--data", text_file, "--window-length", 64, "--windows", 2, "--against", tiny_model]
    assert atom("eval", "kld", tiny_checkpoint, *measure, "--max-kld", 100, "--max-ratio", 100).code == 0
    outcome = atom("eval", "kld", tiny_checkpoint, *measure, "--max-kld", 1e-9, "--json")
    assert outcome.code == 1
    assert "--max-kld" in outcome.err or "above the limit" in outcome.err
    document = json.loads(outcome.out)
    assert document["mean_kld"] > 1e-9
    assert document["error"]["kind"] == "ThresholdError"
    assert atom("eval", "ppl", tiny_checkpoint, *measure, "--max-ratio", 0.5).code == 1


def test_eval_ppl_names_both_conventions(atom, tiny_model, text_file):
    outcome = atom("eval", "ppl", tiny_model, "--data", text_file, "--window-length", 64, "--windows", 2, "--json")
    (row,) = json.loads(outcome.out)["models"]
    assert row["token_perplexity"] > 1
    assert row["word_perplexity"] > row["token_perplexity"]


@pytest.mark.parametrize("command", [["eval", "kld"], ["eval", "ppl"], ["bench", "model"]], ids=" ".join)
def test_a_missing_checkpoint_is_found_before_the_parent_is_measured(command, atom, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("atomcli.cli.models.open_model", None)
    outcome = atom(*command, tmp_path / "nowhere", "--against", tiny_model)
    assert outcome.code == 1
    assert str(tmp_path / "nowhere") in outcome.err


def test_a_limit_that_is_none_is_refused_at_once(atom, tmp_path):
    outcome = atom("eval", "kld", tmp_path / "nowhere", "--max-kld", "nan")
    assert outcome.code == 2
    assert "--max-kld" in outcome.err


def test_a_gate_without_a_parent_is_refused(atom, tiny_model, text_file, snapshot):
    outcome = atom("eval", "ppl", tiny_model, "--data", text_file, "--max-ratio", 1.1)
    assert outcome.code == 2
    snapshot(outcome, "eval-gate-without-parent")


def test_eval_tasks_on_local_questions(atom, tiny_model, tmp_path):
    file = tmp_path / "colors.jsonl"
    questions = [{"query": f"Question: {n}", "choices": ["red", "blue"], "gold": n % 2} for n in range(4)]
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    outcome = atom("eval", "tasks", tiny_model, "--task", file, "--json")
    assert outcome.code == 0, outcome.err
    assert {row["metric"] for row in json.loads(outcome.out)["results"]} >= {"acc"}


def test_questions_that_can_not_be_asked_are_refused_before_the_model_is_read(atom, tmp_path):
    outcome = atom("eval", "tasks", tmp_path / "nowhere", "--task", tmp_path / "colors.jsonl")
    assert outcome.code == 1
    assert "colors.jsonl" in outcome.err


@pytest.mark.parametrize(
    ("model", "output"),
    [
        ("demo", "demo-w8a8"),
        ("meta-llama/Llama-3.1-8B", "Llama-3.1-8B-w8a8"),
        ("models/SmolLM2-1.7B.Q4_0.gguf", "SmolLM2-1.7B.Q4_0-w8a8"),
    ],
)
def test_the_default_output_has_the_name_of_the_model(model, output):
    assert default_output(model, "w8a8") == Path(output)


def test_the_default_output_for_here_has_the_name_of_the_directory(tmp_path, monkeypatch):
    (tmp_path / "Llama-3.1-8B").mkdir()
    monkeypatch.chdir(tmp_path / "Llama-3.1-8B")
    assert default_output(".", "w8a8") == Path("Llama-3.1-8B-w8a8")


def test_bench_model(atom, quantize_options, tmp_path):
    model = write_bytes_model(tmp_path / "wide", head_dim=32)  # no page is made for smaller heads
    checkpoint = tmp_path / "wide-w4a4"
    assert atom("quantize", model, "-o", checkpoint, *quantize_options).code == 0
    arguments = ["--against", model, "--context", 16, "--new-tokens", 2, "--repeats", 1]
    table = atom("bench", "model", checkpoint, *arguments)
    assert table.code == 0, table.err
    assert "reference" in table.out
    document = json.loads(atom("bench", "model", checkpoint, *arguments, "--w8a8", "--json").out)
    assert [row["labels"]["model"] for row in document["rows"]] == [str(model), "W8A8", str(checkpoint)]


@pytest.mark.parametrize("command", [["inspect", "--verify"], ["eval", "ppl"]], ids=" ".join)
def test_a_missing_shard_is_one_sentence(command, atom, tiny_checkpoint):
    (tiny_checkpoint / "model-00002.safetensors").unlink()
    outcome = atom(*command, tiny_checkpoint)
    assert (outcome.code, outcome.out) == (1, "")
    assert "model-00002.safetensors" in outcome.err
    assert "Traceback" not in outcome.err
