"""What can break under a run: each fault costs at most a block, is one sentence, and never makes a wrong checkpoint."""

import logging
import resource
import shutil
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

import atomcli.pipeline.road as road
from atomcli.checkpoint.source import open_source
from atomcli.errors import AtomError, InputError, RunError, UsageError
from atomcli.pipeline.calibrate import calibrate
from atomcli.pipeline.compress import compress
from atomcli.pipeline.model import Walk
from tests.pipeline.conftest import files_of, small_recipe
from tests.pipeline.kills import kills

LAYERS = {"num_hidden_layers": 3}


def make(source, out, tokens, **more):
    return compress(source, small_recipe(), out, tokens=tokens, device="cpu", **more)


@pytest.fixture
def copied(parent, tmp_path) -> Callable[..., object]:
    """A parent of one's own, to be damaged."""

    def make(name="llama"):
        shutil.copytree(parent(name, **LAYERS).path, tmp_path / "parent")
        return open_source(str(tmp_path / "parent"))

    return make


def change(source, name, value):
    """Set one number of a tensor on disk."""
    path = source.path / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[0] = value
    save_file(tensors, path)


@pytest.mark.slow
def test_killed_again_and_again_a_run_ends_with_the_same_bytes(tmp_path):
    killed, finished, _ = kills(12, seed=7, directory=tmp_path)
    assert killed == 12
    assert finished >= 1


def test_a_file_size_limit_is_said_and_the_run_continues_after_it(parent, tokens, tmp_path):
    """The same as a disk that is full in the middle of a file."""
    source = parent(**LAYERS)
    make(source, tmp_path / "whole", tokens)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, 4_000, 20_000):  # tokens, a stream, a shard
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(RunError, match="can't be written"):
                make(source, tmp_path / "out", tokens)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    make(source, tmp_path / "out", tokens)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_out_of_memory_halves_the_chunks_and_changes_nothing(family, parent, tokens, tmp_path, monkeypatch, caplog):
    """Also when it runs out after all linears have seen their inputs: no token counts twice."""
    source = parent(family, **LAYERS)
    original, refused = Walk.forward, []
    monkeypatch.setattr(Walk, "sequences_at_once", lambda self, tokens: 6)

    def small(self, block, index, hidden):
        output = original(self, block, index, hidden)
        if hidden.shape[0] > 1:
            refused.append(hidden.shape[0])
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return output

    monkeypatch.setattr("atomcli.pipeline.ranks.SLOTS", 2)  # of three sequences each: there is something to halve
    expected = make(source, tmp_path / "whole", tokens)
    monkeypatch.setattr(Walk, "forward", small)
    with caplog.at_level(logging.WARNING, logger="atomcli"):
        report = make(source, tmp_path / "out", tokens)
    assert refused
    assert "out of memory with 3 sequences at a time: going on with 2" in caplog.text
    if family == "llama":
        assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    # Experts multiply as few as one row, which BLAS rounds in its own way; every token is counted all the same.
    first = [(row["tokens"], row.get("forced_tokens")) for row in expected["layers"] if "layers.0." in row["linear"]]
    assert [(row["tokens"], row.get("forced_tokens")) for row in report["layers"]][: len(first)] == first
    assert report["proof"]["kld"] == pytest.approx(expected["proof"]["kld"], rel=0.02)


def test_too_little_memory_for_one_sequence_is_one_sentence(parent, tokens, tmp_path, monkeypatch):
    def never(self, block, index, hidden):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Walk, "forward", never)
    with pytest.raises(RunError, match=r"[Mm]emory does not suffice for one sequence in one block: CUDA out of memory"):
        make(parent(), tmp_path / "out", tokens)


def test_too_little_memory_to_quantize_is_one_sentence(parent, tokens, tmp_path, monkeypatch):
    def never(*arguments):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(road, "quantize_block", never)
    with pytest.raises(RunError, match=r"does not suffice to quantize model\.layers\.0"):
        make(parent(), tmp_path / "out", tokens)


def test_a_norm_that_is_not_finite_is_found_before_anything_is_spent(copied, tokens, tmp_path):
    source = copied()
    change(source, "model.layers.2.post_attention_layernorm.weight", float("nan"))
    with pytest.raises(InputError, match=r"model\.layers\.2\.post_attention_layernorm\.weight .* 1 NaN or Inf"):
        make(open_source(str(source.path)), tmp_path / "out", tokens)
    assert not (tmp_path / "out.unfinished").exists()


def test_activations_that_are_not_finite_name_the_block_and_publish_nothing(copied, tokens, tmp_path):
    source = copied()
    change(source, "model.layers.1.mlp.down_proj.weight", 3e38)
    with pytest.raises(AtomError, match=r"model\.layers\.1"):
        make(open_source(str(source.path)), tmp_path / "out", tokens)
    assert not (tmp_path / "out").exists()


def test_a_parent_that_changes_midway_is_noticed_at_once_and_for_good(copied, tokens, tmp_path, monkeypatch):
    """Also when it changes back afterwards: no block of the other parent is in the journal."""
    source = copied()
    path = source.path / "model.safetensors"
    make(source, tmp_path / "whole", tokens)
    before, original = path.read_bytes(), road.Road.block

    def meanwhile(self, index, journal):
        if index == 1:
            change(source, "model.layers.1.self_attn.q_proj.weight", 7.0)
        return original(self, index, journal)

    with monkeypatch.context() as patch:
        patch.setattr(road.Road, "block", meanwhile)
        with pytest.raises(InputError, match="changed while it was read"):
            make(source, tmp_path / "out", tokens)
    with pytest.raises(UsageError, match="model was"):
        make(open_source(str(source.path)), tmp_path / "out", tokens)
    path.write_bytes(before)
    make(open_source(str(source.path)), tmp_path / "out", tokens)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def _truncated(path, other):
    path.write_bytes(path.read_bytes()[:-100])


def _flipped(path, other):
    data = bytearray(path.read_bytes())
    data[-10] ^= 4
    path.write_bytes(data)


def _swapped(path, other):
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


@pytest.mark.parametrize("damage", [_truncated, _flipped, _swapped])
def test_finished_shards_of_an_interrupted_run_are_checked(damage, parent, tokens, tmp_path, monkeypatch):
    source, original = parent(**LAYERS), road.Road.block

    def interrupted(self, index, journal):
        if index == 2:
            raise KeyboardInterrupt
        return original(self, index, journal)

    with monkeypatch.context() as patch:
        patch.setattr(road.Road, "block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(source, tmp_path / "out", tokens)
    shards = [tmp_path / "out.unfinished" / f"model-0000{number}.safetensors" for number in (1, 2)]
    damage(*shards)
    with pytest.raises(InputError, match=r"model-0000[12]\.safetensors is not what the journal"):
        make(source, tmp_path / "out", tokens)
    shutil.rmtree(tmp_path / "out.unfinished")
    make(source, tmp_path / "out", tokens)


@pytest.mark.parametrize("damage", [_truncated, _flipped, _swapped])
def test_damaged_statistics_are_noticed(damage, parent, tokens, tmp_path):
    artifact = calibrate(parent(), small_recipe(), tmp_path / "artifact", tokens=tokens, device="cpu")
    damage(*(artifact.directory / f"statistics-0000{number}.safetensors" for number in (1, 2)))
    with pytest.raises(InputError, match=r"statistics-00001\.safetensors is damaged"):
        make(parent(), tmp_path / "out", tokens, calibration=artifact.directory)
    assert not (tmp_path / "out").exists()
