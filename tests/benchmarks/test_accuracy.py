"""The leaderboard on a tiny model: one recording for all rows, rows that are kept, bits counted from the files."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from atomcli.benchmarks import accuracy, peers, scores
from atomcli.benchmarks.accuracy import adapt, choose_recipes, kind_of, leaderboard
from atomcli.benchmarks.peers import PEERS, choose_peers, parse_pythons, run_peer
from atomcli.benchmarks.scores import Job, load_recording, make, parent_perplexity, score
from atomcli.benchmarks.trial import Trial, export, prepare, record, stored_bits
from atomcli.checkpoint.contents import read_contents
from atomcli.checkpoint.source import open_source
from atomcli.errors import RunError, UsageError
from atomcli.formats.scheme import SCHEMES
from atomcli.overrides import override
from atomcli.recipe import load_recipe
from atomcli.text import evaluation_windows
from tests.helpers.bytes_model import write_bytes_model

GPTQ = PEERS["llmcompressor/gptq-w4a16"]


class Watcher:
    """Nobody watches."""

    def begin(self, stage: str, total: int, unit: str = "block") -> None: ...

    def advance(self, done: int, detail: str = "") -> None: ...

    def end(self) -> None: ...

    def counter(self, stage: str, unit: str) -> Callable[[int, int], None]:
        return lambda done, total: None


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a tokenizer of single bytes."""
    return write_bytes_model(tmp_path_factory.mktemp("models") / "tiny", initializer_range=0.2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text((Path(__file__).parents[2] / "LICENSE").read_text())
    return file


@pytest.fixture
def trial(parent: Path, text: Path, tmp_path: Path) -> Trial:
    source = open_source(str(parent))
    calibration = {"dataset": str(text), "samples": 4, "sequence_length": 64}
    windows = evaluation_windows(str(text), source.tokenizer(), 64, 3)
    return Trial(source, adapt("w4a16", 32, None, calibration), windows, tmp_path / "out", group=32)


def rounded_parent(job: Job, directory: Path) -> None:
    """What a driver does, with a peer that keeps the parent's linears in INT8, one code a byte."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def quantize(checkpoint: Path) -> dict[str, Any]:
        checkpoint.mkdir(parents=True)
        codes = {}
        for name, weight in load_file(job.parent / "model.safetensors").items():
            if "_proj" in name:
                codes[name] = (weight.float() * 20).round().clamp(-7, 7).to(torch.int8)
                codes[f"{name}_scale"] = torch.full((weight.shape[0], 1), 0.05, dtype=torch.float16)
        save_file(codes, checkpoint / "model.safetensors")
        return {"activations": {"bits": 4, "group": None, "scale_bits": 16}, "versions": {"llmcompressor": "1.2"}}

    def load() -> tuple[Any, Any]:
        model = AutoModelForCausalLM.from_pretrained(job.parent, dtype="auto")
        codes = load_file(job.checkpoint / "model.safetensors")
        state = {name: codes[name] * codes[f"{name}_scale"] for name in codes if not name.endswith("_scale")}
        model.load_state_dict({name: value.to(torch.bfloat16) for name, value in state.items()}, strict=False)
        return model.eval(), AutoTokenizer.from_pretrained(job.parent)

    make(job, quantize)
    score(job, load, lambda stage, unit: None)


def test_the_parent_is_no_distance_from_itself(trial: Trial, tmp_path: Path) -> None:
    ground = prepare(trial, Watcher())
    job = ground.job(tmp_path, "parent")
    model = accuracy.decoder.load_parent(trial.source)
    score(job, lambda: (model, trial.source.tokenizer()), lambda stage, unit: None)
    found = json.loads(job.text.read_text())
    assert found["mean_kld"] == pytest.approx(0, abs=1e-9)
    assert found["top1_agreement"] == 1
    assert len(found["window_kld"]) == len(found["window_nll"]) == 3
    own = parent_perplexity(load_recording(job.recording))
    assert own.value == pytest.approx(found["token_perplexity"])
    assert own.standard_error == pytest.approx(found["token_perplexity_standard_error"])

    def unexpected() -> tuple[Any, Any]:
        raise AssertionError("what is measured is not measured again")

    score(job, unexpected, lambda stage, unit: None)


def test_rows_of_ours_and_theirs_and_of_what_is_missing(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "run_peer", lambda peer, python, job, directory: rounded_parent(job, directory))
    recipes = {"w4a16": trial.calibration}
    chosen = [GPTQ, PEERS["gptqmodel/gptq-w4a16"]]
    rows = leaderboard(trial, recipes, [], chosen, {"llmcompressor": Path(sys.executable)}, Watcher())
    by_method = {(row.labels["by"], row.labels["method"]): row for row in rows}
    assert [row.labels["class"] for row in rows] == ["W16A16", "W4A16", "W4A16", "W4A16"]
    ours = next(row for (by, _), row in by_method.items() if by.startswith("atom"))
    theirs = by_method["llmcompressor 1.2", "gptq-w4a16"]
    missing = by_method["gptqmodel", "gptq-w4a16"]
    assert [theirs.measures[name].median for name in ("weights", "activations")] == [  # type: ignore[union-attr]
        pytest.approx(4 + 16 * 512 / 36864, abs=1e-3),  # rows of the seven linears / their weights
        pytest.approx(4 + 16 * 7 / 512, abs=1e-3),  # one scale per linear's input
    ]
    made = read_contents(Path(ours.extra["job"]["checkpoint"]))  # type: ignore[index]
    assert ours.measures["weights"].median == pytest.approx(made.bits_per_weight, abs=1e-3)  # type: ignore[union-attr]
    assert (ours.measures["activations"].median, ours.measures["KV"].median) == (16, 16)  # type: ignore[union-attr]
    assert 0 < ours.measures["KLD"].median < theirs.measures["KLD"].median  # type: ignore[union-attr]
    assert set(missing.measures.values()) == {None}
    assert missing.note == "Not measured: No environment of gptqmodel was given"
    assert rows[-1] is missing

    def unexpected(*arguments: Any, **options: Any) -> None:
        raise AssertionError("what is made is not made again")

    monkeypatch.setattr(accuracy, "run_peer", unexpected)
    monkeypatch.setattr(accuracy, "compress", unexpected)
    again = leaderboard(trial, recipes, [], chosen, {}, Watcher())
    assert [row.measures for row in again] == [row.measures for row in rows]


def test_a_peer_that_fails_leaves_a_row(trial: Trial) -> None:
    pythons = {"gptqmodel": Path(sys.executable)}  # it isn't installed beside us
    rows = leaderboard(trial, {}, [], [PEERS["gptqmodel/gptq-w4a16"]], pythons, Watcher())
    assert "No module named 'gptqmodel'" in rows[-1].note


def test_a_peer_finds_atom_and_nothing_beside_it(trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = prepare(trial, Watcher()).job(tmp_path, "m")
    seen = {}

    def look(command: list[str], env: dict[str, str], **options: Any) -> Any:
        seen.update(env)
        options["stdout"].write(b"step 1\nValueError: no\nbye\n")
        return type("Done", (), {"returncode": 3})

    monkeypatch.setattr(peers.subprocess, "run", look)
    with pytest.raises(RunError, match=r"3, ValueError: no"):
        run_peer(GPTQ, Path(sys.executable), job, tmp_path)
    assert [path.name for path in Path(seen["PYTHONPATH"]).iterdir()] == ["atomcli"]
    assert Job.read(tmp_path / "job.json") == job


def test_stored_bits_are_those_of_the_checkpoint(trial: Trial, tmp_path: Path) -> None:
    from atomcli.pipeline.compress import compress

    ground = prepare(trial, Watcher())
    recipe = override(load_recipe("rtn-w4a4"), group=32, outliers=16)
    compress(trial.source, recipe, tmp_path / "made", tokens=torch.arange(256).view(4, 64))
    contents = read_contents(tmp_path / "made")
    assert stored_bits(tmp_path / "made", ground) == pytest.approx(contents.bits_per_weight)


def test_an_exported_parent_is_the_parent(trial: Trial, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    exported = export(trial.source, tmp_path / "parent")
    tensors = AutoModelForCausalLM.from_pretrained(exported, dtype="auto").state_dict()
    expected = accuracy.decoder.load_parent(trial.source).state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_classes() -> None:
    assert kind_of([SCHEMES["w4a4"], SCHEMES["atom-paper"]]) == "W4A4 INT"
    assert kind_of([SCHEMES["nvfp4"]]) == "W4A4 FP"
    assert kind_of([SCHEMES["w4a8"], SCHEMES["w8a8"]]) == "mixed"
    assert {peer.kind for peer in PEERS.values()} <= {*accuracy.KINDS}


def test_a_group_is_given_where_a_format_has_a_choice() -> None:
    assert adapt("nvfp4", 64, "none", {}).weights.group == 16
    adapted = adapt("atom-w4a4", 64, "none", {"samples": 3})
    assert (adapted.weights.group, adapted.activations.group, adapted.kv_cache.format) == (64, 64, "none")
    assert adapted.calibration.samples == 3


def test_names_of_peers(tmp_path: Path) -> None:
    assert choose_peers(None) == [*PEERS.values()]
    assert choose_peers(["none"]) == []
    assert list(choose_recipes(["none"])) == []
    assert list(choose_recipes(["w4a16"])) == ["w4a16"]
    assert len(choose_recipes(None)) > 1
    with pytest.raises(UsageError) as caught:
        choose_peers(["llmcompressor/gptq-w4a61"])
    assert "llmcompressor/gptq-w4a16" in str(caught.value.hint)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    for path in (tmp_path, tmp_path / "bin" / "python"):
        assert parse_pythons([f"auto-round={path}"]) == {"auto-round": tmp_path / "bin" / "python"}
    for bad in ("auto-round", "auto-rond=/", f"auto-round={tmp_path}/nowhere"):
        with pytest.raises(UsageError, match="--peer-python"):
            parse_pythons([bad])


def test_recordings_survive_the_disk(trial: Trial, tmp_path: Path) -> None:
    recording = record(accuracy.decoder.load_parent(trial.source), trial.windows)
    scores.save_recording(recording, tmp_path / "recording.safetensors")
    loaded = load_recording(tmp_path / "recording.safetensors")
    assert torch.equal(loaded.windows, recording.windows)
    assert all(torch.equal(a, b) for a, b in zip(loaded.hidden, recording.hidden, strict=True))
    hidden = recording.hidden[0]
    assert torch.equal(loaded.head(hidden), recording.head(hidden))
