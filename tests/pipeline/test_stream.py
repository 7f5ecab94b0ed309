"""The stream: what is written comes back in any chunks; what is not finite or not whole is an error."""

import pytest
import torch

from atomcli.errors import InputError, RunError
from atomcli.pipeline.stream import Stream, chunk_sequences


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
