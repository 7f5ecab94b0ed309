"""What the road leaves to its threads, and in which order that reaches the disk."""

import itertools
import threading

import pytest
import torch

import atomcli.pipeline.model as model
from atomcli.errors import InputError
from atomcli.formats.scheme import scheme_named
from atomcli.pipeline.compress import compress
from atomcli.pipeline.held import begin_copy
from atomcli.pipeline.journal import Journal
from atomcli.pipeline.model import start_walk
from atomcli.pipeline.parameters import Unwritten
from atomcli.pipeline.stream import Stream
from tests.pipeline.conftest import small_recipe


def test_the_streams_of_the_proof_are_synced_beside_the_work_and_before_their_block_is_published(
    parent, tokens, tmp_path, monkeypatch
):
    """Calibration sequences can be computed again; what the proof compares can't."""
    synced, published, threads = set(), 0, set()
    sync, publish = Stream.sync, Journal.publish

    def watched_sync(stream):
        sync(stream)
        synced.add(stream.path.name)
        threads.add(threading.current_thread())

    def watched_publish(journal, step):
        nonlocal published
        if "shard" in step:
            after = step["block"] + 1
            assert {f"parent-{after:05d}.stream", f"checkpoint-{after:05d}.stream"} <= synced
            published += 1
        publish(journal, step)

    monkeypatch.setattr(Stream, "sync", watched_sync)
    monkeypatch.setattr(Journal, "publish", watched_publish)
    compress(parent(num_hidden_layers=3), small_recipe(), tmp_path / "out", tokens=tokens, device="cpu")
    assert published == 3
    # The last sync is of the proof itself, after the road.
    synced.discard("reopened.stream")
    assert len(synced) == 6
    assert any(thread is not threading.main_thread() for thread in threads)


@pytest.mark.parametrize("readers", [1, 3])
def test_a_block_is_the_same_however_many_tensors_are_read_at_once(readers, parent, monkeypatch):
    monkeypatch.setattr(model, "_READERS", {"cpu": readers})
    walk = start_walk(parent("mixtral"), "cpu")
    fetch, calls = walk.source._read, itertools.count()
    met = threading.Barrier(readers, timeout=60)

    def watched(name):
        if next(calls) < readers:  # the first ones wait for each other
            met.wait()
        return fetch(name)

    monkeypatch.setattr(walk.source, "_read", watched)
    names = walk._names(1)
    block = walk.load(1)
    assert list(block) == list(names)
    assert all(torch.equal(block[name], fetch(disk)) for name, disk in names.items())


def test_a_damaged_tensor_is_named_by_whichever_thread_reads_it(parent, monkeypatch):
    monkeypatch.setattr(model, "_READERS", {"cpu": 3})
    walk = start_walk(parent("llama"), "cpu")
    fetch, damaged = walk.source._read, walk._names(1)["mlp.down_proj.weight"]
    monkeypatch.setattr(walk.source, "_read", lambda name: fetch(name) * torch.nan if name == damaged else fetch(name))
    with pytest.raises(InputError, match=damaged.replace(".", r"\.")):
        walk.load(1)


def test_the_host_s_own_tensors_are_copied_only_where_they_will_change():
    x = torch.randn(3)
    same, arrived = begin_copy({"x": x})
    copied, _ = begin_copy({"x": x}, copy=True)
    arrived()
    assert same["x"].data_ptr() == x.data_ptr() != copied["x"].data_ptr()
    assert torch.equal(copied["x"], x)


def test_weights_stay_on_the_device_until_their_block_is_written():
    """Each by itself would leave it through fresh pages, while the device waits."""
    linear = Unwritten(256, 16, scheme_named("w4a4"), device="meta")
    linear.keep_on_host()
    assert linear.device == torch.device("meta")
    assert all(tensor.is_meta for tensor in linear.state_dict().values())
