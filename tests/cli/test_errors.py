"""A wrong command line, recipe or model is one sentence, one hint and an exit code: never a traceback."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from atomcli.cli import doctor


@pytest.fixture
def bad_recipe(tmp_path):
    """Writes recipe text and answers its path."""

    def write(text: str) -> str:
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("unknown-command", ["quantise"]),
        ("unknown-option", ["quantize", "demo", "--bitz", "4"]),
        ("missing-argument", ["quantize"]),
        ("missing-subcommand", ["eval"]),
        ("bits-5", ["quantize", "demo", "--bits", "5"]),
        ("group-100", ["quantize", "demo", "--group", "100"]),
        ("rounding", ["quantize", "demo", "--rounding", "up"]),
        ("clip", ["quantize", "demo", "--clip", "7"]),
        ("unknown-recipe", ["quantize", "demo", "--recipe", "atom-w4a5"]),
        ("convention", ["eval", "ppl", "demo", "--convention", "character"]),
        ("bench-scheme", ["bench", "gemm", "--scheme", "w3a3"]),
        ("bench-shape", ["bench", "gemm", "--shape", "4096"]),
        ("bench-format", ["bench", "model", "demo", "--format", "xml"]),
        ("clip-word", ["quantize", "demo", "--clip", "searched"]),
        ("costs-without-budget", ["quantize", "demo", "--costs", "gemm.json"]),
        ("device", ["eval", "ppl", "demo", "--device", "gpu"]),
        (
            "gate-without-its-measure",
            ["eval", "ppl", "a", "--against", "b", "--convention", "word", "--max-ratio", "2"],
        ),
        ("group-of-rows", ["quantize", "demo", "--recipe", "w8a8", "--group", "64"]),
        ("plan-and-budget", ["quantize", "demo", "--plan", "plan.json", "--memory", "1GB"]),
        ("window-length", ["eval", "kld", "demo", "--window-length", "1"]),
    ],
)
def test_wrong_usage_exits_2(name, arguments, atom, snapshot):
    outcome = atom(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    snapshot(outcome, f"error-{name}")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("key", "weights: {fromat: int4}"),
        ("value", "weights: {format: int3}"),
        ("section", "weigths: {format: int4}"),
        ("disagreement", "weights: {group: 64}\nactivations: {group: 128}"),
        ("list", "- weights"),
        ("section-of-a-number", "weights: 4"),
        ("group-of-text", "weights: {group: none}"),
        ("combination", "kv_cache: {format: int4, position: before_rope, hadamard: true}"),
    ],
)
def test_wrong_recipe_exits_2(name, text, bad_recipe, atom, snapshot):
    outcome = atom("recipes", "validate", bad_recipe(text))
    assert outcome.code == 2
    snapshot(outcome, f"recipe-{name}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantize", "demo", "--bits", "four"], ["--bits"]),
        (["quantize", "demo", "--samples", "0"], ["calibration.samples is 0"]),
        (["recipes", "validate", "samples: many"], ["samples is 'many'"]),
        (["recipes", "validate", "{"], ["bad.yaml can't be read"]),
    ],
)
def test_messages_with_words_of_other_libraries(arguments, words, bad_recipe, atom):
    if arguments[0] == "recipes":
        text = {"samples: many": "calibration: {samples: many}"}.get(arguments[2], arguments[2])
        arguments = [*arguments[:2], bad_recipe(text)]
    outcome = atom(*arguments)
    assert outcome.code == 2
    assert all(word in outcome.err for word in words)


@pytest.mark.parametrize("command", [["quantize"], ["eval", "ppl"], ["calibrate"]], ids=" ".join)
def test_missing_model_exits_1(command, atom, tmp_path, snapshot):
    outcome = atom(*command, tmp_path / "nowhere")
    assert outcome.code == 1
    snapshot(outcome, "-".join(["missing-model", *command]))


def test_missing_checkpoint(atom, tmp_path, snapshot):
    snapshot(atom("inspect", tmp_path / "nowhere"), "missing-checkpoint")


def test_occupied_output_exits_2_before_anything_is_read(atom, tmp_path, snapshot):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("irreplaceable")
    snapshot(atom("quantize", tmp_path / "nowhere", "-o", out), "occupied-output")
    assert (out / "thesis.txt").read_text() == "irreplaceable"


@pytest.mark.parametrize("command", ["quantize", "calibrate", "plan"])
@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:99"])
def test_a_device_that_is_not_here_exits_2(command, device, atom, tiny_model):
    outcome = atom(command, tiny_model, "--device", device)
    assert outcome.code == 2
    assert f"--device is '{device}'" in outcome.err


def test_an_occupied_calibration_exits_2_before_anything_is_read(atom, tmp_path):
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    outcome = atom("calibrate", tmp_path / "nowhere", "-o", tmp_path)
    assert outcome.code == 2
    assert "is not empty" in outcome.err


def test_an_unfinished_checkpoint_is_called_so_by_either_name(atom, tmp_path):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "journal.json").write_text("{}")
    for name in ("out", "out.unfinished"):
        for command in (["inspect"], ["eval", "ppl"]):
            outcome = atom(*command, tmp_path / name)
            assert outcome.code == 1
            assert "out.unfinished is an unfinished checkpoint" in outcome.err
            assert "`atom quantize`" in outcome.err


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_reader_that_leaves_is_no_failure(form):
    command = [sys.executable, "-m", "atomcli", "recipes", "list", *form]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert b"Error" not in process.stderr.read()
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_results_that_can_not_be_written_are_one_sentence(form):
    command = [sys.executable, "-m", "atomcli", "recipes", "list", "--quiet", *form]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: stdout can't be written: No space left on device.\n"


def test_json_errors_are_one_document_on_stdout(atom):
    for arguments in (["quantise"], ["quantize", "demo", "--bits", "5"], ["recipes", "show", "nope"]):
        outcome = atom("--json", *arguments)
        assert outcome.code == 2
        error = json.loads(outcome.out)["error"]
        assert set(error) == {"kind", "what", "hint"}
        assert error["what"] in outcome.err


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_interruptions(sent):
    script = (
        "import os, signal; from atomcli.cli import app, doctor;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # a background job starts with it ignored
        f"doctor._software = lambda: os.kill(os.getpid(), {int(sent)}) or __import__('time').sleep(9);"
        "app.main(['doctor'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: Interrupted.\n")


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "Interrupted"),
        (RuntimeError("the moon is full\nsecond line"), 1, "RuntimeError: the moon is full"),
        (MemoryError(), 1, "MemoryError"),
    ],
)
def test_whatever_happens_ends_in_a_sentence(raised, code, words, atom, monkeypatch, tmp_path):
    monkeypatch.setenv("ATOM_CACHE", str(tmp_path))

    def fail():
        raise raised

    monkeypatch.setattr(doctor, "_software", fail)
    outcome = atom("doctor")
    assert outcome.code == code
    assert words in outcome.err
    assert "Traceback" not in outcome.err
    if code == 1:
        assert "Traceback" in next((tmp_path / "logs").glob("*-crash-*.log")).read_text()
        assert "Traceback" in atom("doctor", "--debug").err
