import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from atomcli.checkpoint.tensorfile import DTYPES, TensorFile
from atomcli.checkpoint.writer import write_shard
from atomcli.errors import InputError


def every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (3, 16), generator=generator, dtype=torch.uint8)
    tensors = {}
    for name, dtype in DTYPES.items():
        tensors[f"t.{name}"] = raw % 2 == 0 if dtype == torch.bool else raw.view(dtype).clone()
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.empty((0, 4), dtype=torch.float16)}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    bits = left.contiguous().reshape(-1).view(torch.uint8), right.contiguous().reshape(-1).view(torch.uint8)
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    opened = TensorFile(tmp_path / "a.safetensors")
    assert opened.entries.keys() == tensors.keys()
    assert opened.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        assert same(opened.read(name), tensor), name


def test_safetensors_reads_what_we_wrote(tmp_path: Path) -> None:
    tensors = every_dtype()
    write_shard(tmp_path, "a.safetensors", tensors)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as opened:
        assert set(opened.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            assert same(opened.get_tensor(name), tensor), name
    assert all(
        entry.start % entry.dtype.itemsize == 0 for entry in TensorFile(tmp_path / "a.safetensors").entries.values()
    )


def test_a_read_tensor_owns_its_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4)}, path)
    opened = TensorFile(path)
    opened.read("a").zero_()
    assert opened.read("a").tolist() == [1, 1, 1, 1]


def test_every_truncation_is_named(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.ones(3, 5), "b": torch.ones(7, dtype=torch.int8)}, whole)
    data = whole.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"cut\.safetensors (is truncated|is not a valid)"):
            TensorFile(cut)


def test_trailing_bytes_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3)}, path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InputError, match="1 bytes follow the last tensor"):
        TensorFile(path)


def test_a_damaged_header_never_ends_in_a_traceback(tmp_path: Path) -> None:
    """Whatever byte of the header is changed: one sentence, or a header that still describes the file exactly."""
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.ones(3, 5), "b": torch.ones(8, dtype=torch.int8)}, whole)
    data = whole.read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    damaged = tmp_path / "damaged.safetensors"
    draw = random.Random(0)
    refused = []
    for position in range(header_end):
        for value in {0, 255, data[position] ^ 1, draw.randrange(256)} - {data[position]}:
            damaged.write_bytes(data[:position] + bytes([value]) + data[position + 1 :])
            try:
                opened = TensorFile(damaged)
            except InputError as error:
                refused.append(error)
            else:
                for name in opened.entries:
                    opened.read(name)
    assert len(refused) > header_end
    assert all(str(damaged) in error.what and "\n" not in error.what and error.hint for error in refused)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "can't have 4 bytes"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}, "has shape"),
        ({"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}, "as F4, which atom doesn't read"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "begins at byte"),
        ({"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}, "has no dtype, shape and data_offsets"),
        ({"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}, "has no dtype, shape|has shape"),
        ([], "has no dtype, shape and data_offsets"),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, "which atom doesn't read"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "has shape"),
        ({"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}, "has shape"),
    ],
)
def test_entries_that_contradict_themselves(tmp_path: Path, entry: object, message: str) -> None:
    header = json.dumps({"weight": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(InputError, match=message) as caught:
        TensorFile(path)
    assert "weight" in caught.value.what


def test_a_file_cut_off_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"late": torch.ones(64)}, path)
    opened = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="while tensor late was read"):
        opened.read("late")
