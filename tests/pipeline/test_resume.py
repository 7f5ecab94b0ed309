"""Interrupted runs continue, end with the same bytes, and notice when they are no longer the same run."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import atomcli.pipeline.calibrate as calibration_stage
import atomcli.pipeline.compress as order
import atomcli.pipeline.finish as ending
import atomcli.pipeline.journal as journals
import atomcli.pipeline.road as road
from atomcli.errors import InputError, RunError, UsageError
from atomcli.pipeline.calibrate import calibrate
from atomcli.pipeline.compress import compress
from atomcli.pipeline.held import Held
from atomcli.pipeline.journal import locked
from tests.pipeline.conftest import files_of, small_recipe

LAYERS = {"num_hidden_layers": 4}


class Interrupted(BaseException):
    """Stands for a kill: nothing in the code may catch it."""


def interrupted(*arguments, **keywords):
    """Takes the place of a function that a run never reached."""
    raise Interrupted


def interrupt_at(monkeypatch, module, name, call):
    """Let the `call`-th call of a function raise after it has done its work."""
    original, calls = getattr(module, name), [0]

    def wrapped(*arguments, **keywords):
        result = original(*arguments, **keywords)
        calls[0] += 1
        if calls[0] == call:
            raise Interrupted
        return result

    monkeypatch.setattr(module, name, wrapped)


@pytest.fixture
def expected(parent, tokens, tmp_path):
    compress(parent(**LAYERS), small_recipe(), tmp_path / "whole", tokens=tokens, device="cpu")
    return files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (road, "write_shard", 1),  # a shard without its journal entry
        (road, "write_shard", 3),
        (road, "quantize_block", 2),
        (ending, "finish", 1),  # everything written, nothing proved
        (calibration_stage, "write_shard", 3),  # in the middle of stage 1
        (calibration_stage, "publish", 1),  # between the stages
    ],
    ids=lambda value: getattr(value, "__name__", str(value)).rpartition(".")[2],
)
def test_an_interrupted_run_ends_with_the_same_bytes(
    module, name, call, expected, parent, tokens, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        interrupt_at(patch, module, name, call)
        with pytest.raises(Interrupted):
            compress(parent(**LAYERS), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    assert not (tmp_path / "out").exists()
    compress(parent(**LAYERS), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    assert files_of(tmp_path / "out") == expected


def _never(*arguments, **keywords):
    raise AssertionError("finished work is done again")


@pytest.mark.parametrize("moment", ["write_rest", "_publish", "publish"])
def test_a_run_interrupted_while_publishing_has_only_to_publish(
    moment, expected, parent, tokens, tmp_path, monkeypatch
):
    """After the proof: before anything is tidied away, in the middle of it, and right before the rename."""
    arguments = {"tokens": tokens, "device": "cpu"}
    with monkeypatch.context() as patch:
        if moment == "write_rest":
            interrupt_at(patch, order, "write_rest", 1)
        elif moment == "_publish":
            interrupt_at(patch, order.shutil, "rmtree", 1)
        else:
            patch.setattr(order, "publish", interrupted)
        with pytest.raises(Interrupted):
            compress(parent(**LAYERS), small_recipe(), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
    for name in ("calibrate", "write_rest"):
        monkeypatch.setattr(order, name, _never)
    compress(parent(**LAYERS), small_recipe(), tmp_path / "out", **arguments)
    assert files_of(tmp_path / "out") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_calibration_interrupted_before_its_rename_has_only_to_publish(parent, tokens, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(calibration_stage, "publish", interrupted)
        with pytest.raises(Interrupted):
            calibrate(parent(), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    monkeypatch.setattr(calibration_stage, "_calibrate_block", _never)
    calibrate(parent(), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_abandoned_calibration_is_not_published(parent, tokens, tmp_path, monkeypatch):
    """Interrupted in its own calibration and continued with an artifact, a run leaves nothing of the former."""
    with monkeypatch.context() as patch:
        patch.setattr(calibration_stage, "publish", interrupted)
        with pytest.raises(Interrupted):
            compress(parent(), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    calibrate(parent(), small_recipe(), tmp_path / "artifact", tokens=tokens, device="cpu")
    compress(parent(), small_recipe(), tmp_path / "out", calibration=tmp_path / "artifact", device="cpu")
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("calibration")]


def test_finished_blocks_are_not_done_again(parent, tokens, tmp_path, monkeypatch):
    done = []
    original = road.Road.block

    def counted(self, index, journal):
        if index == 2 and 2 not in done:
            done.append(index)
            raise Interrupted
        done.append(index)
        return original(self, index, journal)

    monkeypatch.setattr(road.Road, "block", counted)
    arguments = {"tokens": tokens, "device": "cpu"}
    with pytest.raises(Interrupted):
        compress(parent(**LAYERS), small_recipe(), tmp_path / "out", **arguments)
    streams = {path.name.split(".")[0] for path in (tmp_path / "out.unfinished").glob("*.stream")}
    assert streams == {f"{name}-00002" for name in ("calibration", "checkpoint", "parent")}
    compress(parent(**LAYERS), small_recipe(), tmp_path / "out", **arguments)
    assert done == [0, 1, 2, 2, 3]


@pytest.mark.slow
def test_kill_minus_nine(expected, parent, tokens, tmp_path):
    """A process killed at an arbitrary moment, again and again, until one gets through."""
    script = textwrap.dedent("""
        import sys, torch
        from pathlib import Path
        from atomcli.checkpoint.source import open_source
        from atomcli.pipeline.compress import compress
        from tests.helpers.tiny import random_tokens
        from tests.pipeline.conftest import small_recipe
        torch.set_num_threads(1)
        compress(open_source(sys.argv[1]), small_recipe(), Path(sys.argv[2]), tokens=random_tokens(6, 24), device="cpu")
    """)
    out, journal = tmp_path / "out", tmp_path / "out.unfinished" / "journal.json"
    command = [sys.executable, "-c", script, str(parent(**LAYERS).path), str(out)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and b'"block": 1' in journal.read_bytes():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    subprocess.run(command, env=environment, check=True)
    assert files_of(out) == expected


def test_a_changed_recipe_is_noticed_and_said(parent, tokens, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, road, "write_shard", 2)
        with pytest.raises(Interrupted):
            compress(parent(), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    changed = small_recipe(weights={"clip": 0.9})
    with pytest.raises(UsageError, match=r"recipe\.weights\.clip was 0\.85, now 0\.9"):
        compress(parent(), changed, tmp_path / "out", tokens=tokens, device="cpu")
    with pytest.raises(UsageError, match="model was"):
        compress(parent("qwen3"), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    with pytest.raises(UsageError, match="tokens was"):
        compress(parent(), small_recipe(), tmp_path / "out", tokens=tokens[:4], device="cpu")
    monkeypatch.setattr(order, "__version__", "99.0")
    with pytest.raises(UsageError, match=r"atom was .*, now \"99\.0\""):
        compress(parent(), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    compress(parent(), changed, tmp_path / "out", tokens=tokens, device="cpu", overwrite=True)
    assert (tmp_path / "out").is_dir()


def test_a_damaged_shard_of_an_interrupted_run_is_noticed(parent, tokens, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, ending, "finish", 1)
        with pytest.raises(Interrupted):
            compress(parent(), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    shard = tmp_path / "out.unfinished" / "model-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"model-00001\.safetensors is not what the journal"):
        compress(parent(), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")


def test_two_atoms_do_not_write_one_directory(parent, tokens, tmp_path):
    with locked(tmp_path / "out.unfinished"), pytest.raises(UsageError, match="Another atom is working"):
        compress(parent(), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")


def test_a_full_disk_is_said_and_the_run_continues_after_it(expected, parent, tokens, tmp_path, monkeypatch):
    arguments = {"tokens": tokens, "device": "cpu"}
    with monkeypatch.context() as patch:
        import shutil

        real, calls = shutil.disk_usage, [0]

        def nearly_full(path):
            calls[0] += 1
            usage = real(path)
            return usage if calls[0] < 9 else usage._replace(free=100)

        patch.setattr(shutil, "disk_usage", nearly_full)
        with pytest.raises(RunError, match="full"):
            compress(parent(**LAYERS), small_recipe(), tmp_path / "out", **arguments)
    compress(parent(**LAYERS), small_recipe(), tmp_path / "out", **arguments)
    assert files_of(tmp_path / "out") == expected


def test_calibration_resumes_too(parent, tokens, tmp_path, monkeypatch):
    source = parent(**LAYERS)
    calibrate(source, small_recipe(), tmp_path / "whole", tokens=tokens, device="cpu")
    with monkeypatch.context() as patch:
        interrupt_at(patch, calibration_stage, "write_shard", 3)
        with pytest.raises(Interrupted):
            calibrate(source, small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    calibrate(source, small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    again = calibrate(source, small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    assert again.tokens.equal(tokens)
    with pytest.raises(UsageError, match="holds another calibration: tokens was"):
        calibrate(source, small_recipe(), tmp_path / "out", tokens=tokens[:2], device="cpu")


@pytest.mark.parametrize("slots", [6, 3], ids=["all", "half"])
def test_hidden_states_that_are_held_change_nothing(slots, expected, parent, tokens, tmp_path, monkeypatch):
    """Nor does an interruption: the files beside them are those of a run that holds nothing."""
    source = parent(**LAYERS)
    limit = slots * tokens.shape[1] * source.config.hidden_size * 4  # slots of one sequence
    for stage in (calibration_stage, road):
        monkeypatch.setattr(stage, "held_on", lambda device: Held(device, limit))
    for stage in (calibration_stage, road):
        with monkeypatch.context() as patch:
            interrupt_at(patch, stage, "write_shard", 2)
            with pytest.raises(Interrupted):
                compress(source, small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    compress(source, small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    assert files_of(tmp_path / "out") == expected


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize(("stage", "call"), [(calibration_stage, 3), (road, 3)], ids=["calibrate", "quantize"])
def test_what_a_power_cut_takes_is_computed_again(stage, call, family, parent, tokens, tmp_path, monkeypatch):
    """Hidden states are not synced: after a restart of the machine their files are worth nothing."""
    compress(parent(family, **LAYERS), small_recipe(), tmp_path / "whole", tokens=tokens, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(journals, "machine", lambda: "before")
        interrupt_at(patch, stage, "write_shard", call)
        with pytest.raises(Interrupted):
            compress(parent(family, **LAYERS), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    unsynced = "calibration-*" if stage is road else "parent-*"
    lost = list(tmp_path.glob(f"out.unfinished/**/{unsynced}.stream"))
    assert lost
    for file in lost:
        file.write_bytes(b"")
    compress(parent(family, **LAYERS), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
