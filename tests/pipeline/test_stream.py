"""The stream: what is written comes back in any chunks; what is not finite or not whole is an error."""

import pytest
import torch

from atomcli.errors import InputError, RunError
from atomcli.pipeline.held import Held
from atomcli.pipeline.stream import Stream, chunk_sequences, run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_comes_back_bit_for_bit(dtype, tmp_path):
    x = torch.randn(7, 5, 3).to(dtype)
    stream = Stream(tmp_path / "s", (7, 5, 3), dtype)
    stream.write(iter(x.split([2, 1, 4])), "test")
    for at_once in (1, 3, 7, 100):
        assert torch.equal(torch.cat(list(stream.chunks(at_once))), x)


def test_a_number_that_is_not_finite_names_its_block(tmp_path):
    x = torch.zeros(2, 3, 4)
    x[1, 2, 3] = float("inf")
    with pytest.raises(RunError, match=r"model\.layers\.7 put out 1 NaN or Inf of 24"):
        Stream(tmp_path / "s", (2, 3, 4), torch.float32).write(iter([x]), "model.layers.7")


def test_a_file_of_the_wrong_size_is_refused(tmp_path):
    stream = Stream(tmp_path / "s", (2, 3, 4), torch.float32)
    with pytest.raises(InputError, match="missing"):
        list(stream.chunks(1))
    (tmp_path / "s").write_bytes(b"x" * 95)
    with pytest.raises(InputError, match="wrong size"):
        list(stream.chunks(1))


def test_chunks_shrink_with_the_width():
    cpu = torch.device("cpu")
    assert chunk_sequences(2048, 1536, cpu) == 1
    assert chunk_sequences(64, 512, cpu) == 128
    assert chunk_sequences(2048, 28672, cpu) == 1


def held_stream(path, held, rows=None):
    return Stream(path, (6, 5, 3), torch.float32, rows, held)


def test_what_is_held_is_in_the_file_as_well(tmp_path):
    x, held = torch.randn(6, 5, 3), Held(torch.device("cpu"), 1 << 20)
    stream = held_stream(tmp_path / "s", held)
    for rows in (range(2), range(2, 6)):
        stream.part(rows).write(iter(x[rows.start : rows.stop].split([1] * len(rows))), "test", sync=False)
    stream.settle()
    for rows in (range(2), range(2, 6)):
        assert held.slot(rows) is not None
        for source in (stream, held_stream(tmp_path / "s", None)):
            assert torch.equal(torch.cat(list(source.part(rows).chunks(3))), x[rows.start : rows.stop])
    assert list(stream.part(range(0)).chunks(1)) == []
    assert len(list(tmp_path.iterdir())) == 2
    stream.remove()
    assert not list(tmp_path.iterdir())


def test_a_generation_takes_the_place_of_the_one_before_in_memory_and_not_in_its_file(tmp_path):
    x, held = torch.randn(6, 5, 3), Held(torch.device("cpu"), 1 << 20)
    first, second = held_stream(tmp_path / "a", held), held_stream(tmp_path / "b", held)
    first.write(iter([x]), "test")
    second.write((chunk + 1 for chunk in first.chunks(2)), "test")
    assert torch.equal(torch.cat(list(second.chunks(6))), x + 1)
    assert held.release()
    assert not held.release()
    assert torch.equal(torch.cat(list(second.chunks(2))), x + 1)
    assert torch.equal(torch.cat(list(first.chunks(2))), x)


def test_slots_beyond_the_limit_go_through_the_file(tmp_path):
    x, held = torch.randn(6, 5, 3), Held(torch.device("cpu"), 2 * 5 * 3 * 4)
    stream = held_stream(tmp_path / "s", held)
    for rows in (range(2), range(2, 4), range(4, 6)):
        stream.part(rows).write(iter([x[rows.start : rows.stop]]), "test", sync=False)
        assert (held.slot(rows) is not None) == (rows.start == 0)
        assert torch.equal(torch.cat(list(stream.part(rows).chunks(1))), x[rows.start : rows.stop])


def test_memory_is_given_back_before_chunks_get_smaller(tmp_path, caplog):
    x, held, seen = torch.randn(6, 5, 3), Held(torch.device("cpu"), 1 << 20), []
    first, second = held_stream(tmp_path / "a", held), held_stream(tmp_path / "b", held)
    first.write(iter([x]), "test")

    def block(chunk):
        seen.append(chunk.shape[0])
        if len(seen) == 2 or (chunk.shape[0] > 2 and len(seen) > 3):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return chunk * 2

    second.write(run(first, 3, block), "test")
    assert seen == [3, 3, 3]
    assert not caplog.records
    assert held.slot(range(6)) is None
    assert torch.equal(torch.cat(list(second.chunks(6))), x * 2)


def test_a_held_number_that_is_not_finite_names_its_block(tmp_path):
    x = torch.zeros(6, 5, 3)
    x[1, 2, 2] = float("nan")
    with pytest.raises(RunError, match=r"model\.layers\.7 put out 1 NaN or Inf of 90"):
        held_stream(tmp_path / "s", Held(torch.device("cpu"), 1 << 20)).write(iter([x]), "model.layers.7")


def test_a_disk_that_refuses_what_is_held_is_said_when_the_file_is_relied_on(tmp_path):
    stream = held_stream(tmp_path / "lacking" / "s", Held(torch.device("cpu"), 1 << 20))
    stream.write(iter([torch.zeros(6, 5, 3)]), "test", sync=False)
    with pytest.raises(RunError, match="can't be written"):
        stream.sync()
