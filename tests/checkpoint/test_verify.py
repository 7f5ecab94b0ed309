import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from atomcli.checkpoint import writer
from atomcli.checkpoint.manifest import MANIFEST
from atomcli.checkpoint.tensorfile import TensorFile
from atomcli.checkpoint.verify import read_checkpoint, verify_checkpoint
from atomcli.errors import InputError, UnsupportedError
from atomcli.formats.scheme import SCHEMES
from atomcli.formats.weights import QuantizedWeight
from tests.helpers.checkpoints import LINEARS, SCHEME, random_weight, write_checkpoint, write_model

BLOCKS = ["model-00001.safetensors", "model-00002.safetensors"]


def test_what_was_written_verifies_and_reads_back(checkpoint: Path) -> None:
    manifest = verify_checkpoint(checkpoint)
    assert set(manifest.shards) == {"model-00000.safetensors", *BLOCKS}
    opened = read_checkpoint(checkpoint)
    assert opened.config.model_type == "llama"
    assert opened.quantization["kept"] == ["model.norm.weight"]
    assert opened.report == {}
    for block, (linear, shape) in enumerate(LINEARS.items()):
        tensors = opened.linear_tensors(linear)
        weight = QuantizedWeight.from_tensors(SCHEMES[SCHEME], shape, tensors)
        assert torch.equal(weight.dequantize(), random_weight(SCHEME, *shape, seed=block).dequantize())
        name = f"{linear}.permutation"
        assert opened.dtype(name) == torch.int16
        assert opened.shape(name) == (shape[1],)
        assert opened.nbytes(name) == 2 * shape[1]
    assert sum(opened.shards.values()) == sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    with pytest.raises(InputError, match="has no tensor nothing"):
        opened.read("nothing")


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_every_scheme_has_its_tensors(tmp_path: Path, scheme: str) -> None:
    verify_checkpoint(write_checkpoint(tmp_path / scheme, scheme))


def test_a_directory_is_verified_before_it_is_published(checkpoint: Path) -> None:
    made = writer.unfinished(checkpoint)
    checkpoint.rename(made)
    verify_checkpoint(made)
    with pytest.raises(InputError, match="is an unfinished checkpoint"):
        read_checkpoint(made)


def test_any_flipped_bit_of_any_file_is_found_and_its_file_named(checkpoint: Path) -> None:
    draw = random.Random(0)
    names = [file.name for file in checkpoint.iterdir()]
    for name in sorted(set(names) - {MANIFEST}):
        whole = (checkpoint / name).read_bytes()
        places = {0, 9, len(whole) - 1} | {draw.randrange(len(whole)) for _ in range(20)}
        for place in places:
            data = bytearray(whole)
            data[place] ^= 1 << draw.randrange(8)
            (checkpoint / name).write_bytes(data)
            with pytest.raises(InputError) as caught:
                verify_checkpoint(checkpoint)
            assert name in caught.value.what
        (checkpoint / name).write_bytes(whole)
    verify_checkpoint(checkpoint)


def test_the_damaged_tensor_is_named(checkpoint: Path) -> None:
    file = checkpoint / BLOCKS[1]
    entries = TensorFile(file).entries
    for name, entry in entries.items():
        whole = file.read_bytes()
        data = bytearray(whole)
        data[(entry.start + entry.end) // 2] ^= 4
        file.write_bytes(data)
        with pytest.raises(InputError, match="SHA-256 differs") as caught:
            verify_checkpoint(checkpoint)
        assert f"Tensor {name} in {file}" in caught.value.what
        file.write_bytes(whole)


def test_swapped_shards_are_named(checkpoint: Path) -> None:
    first, second = (checkpoint / name for name in BLOCKS)
    data = first.read_bytes()
    shutil.copy(second, first)
    second.write_bytes(data)
    with pytest.raises(InputError, match=r"model-00001.* holds the tensors of model-00002.*: the shards were swapped"):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_shard_is_named(checkpoint: Path, kept: int) -> None:
    file = checkpoint / BLOCKS[0]
    file.write_bytes(file.read_bytes()[:kept])
    for check in (verify_checkpoint, read_checkpoint):
        with pytest.raises(InputError, match=r"model-00001\.safetensors is truncated"):
            check(checkpoint)


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    (checkpoint / BLOCKS[0]).unlink()
    for check in (verify_checkpoint, read_checkpoint):
        with pytest.raises(InputError, match=r"Shard .*model-00001\.safetensors is missing"):
            check(checkpoint)


@pytest.mark.parametrize("name", ["config.json", MANIFEST, "model.safetensors.index.json"])
def test_a_missing_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(InputError) as caught:
        verify_checkpoint(checkpoint)
    assert name in caught.value.what


def test_a_rewritten_shard_is_found(checkpoint: Path) -> None:
    """A shard with a tensor of another dtype, one more or one less, is named with the tensor."""
    file = checkpoint / BLOCKS[0]
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight_row_scale"
    for changed, message in (
        (tensors | {name: tensors[name].half()}, rf"Tensor {name} .* is F16 \[24\], but F32 \[24\] was written"),
        (tensors | {"extra": torch.ones(1)}, "holds the unknown tensor extra"),
        ({other: tensor for other, tensor in tensors.items() if other != name}, f"lacks tensor {name}"),
    ):
        save_file(changed, file)
        with pytest.raises(InputError, match=message):
            verify_checkpoint(checkpoint)


def remake(checkpoint: Path, change: dict[str, torch.Tensor | None], entry: dict[str, Any] | None = None) -> Path:
    """The checkpoint with other tensors in its first block, manifest and all: a writer that made a mistake."""
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["linears"]["model.layers.0.self_attn.q_proj"] |= entry or {}
    (checkpoint / "config.json").write_text(json.dumps(config))
    records = []
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors: dict[str, torch.Tensor | None] = dict(load_file(file))
        if file.name == BLOCKS[0]:
            tensors |= {f"model.layers.0.self_attn.q_proj.{suffix}": tensor for suffix, tensor in change.items()}
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        records.append(writer.write_shard(checkpoint, file.name, present))
    writer.finish(checkpoint, records)
    return checkpoint


@pytest.mark.parametrize(
    ("change", "entry", "message"),
    [
        ({"weight_row_scale": None}, {}, r"weight_row_scale is missing; scheme w4a8 needs F32 \[24\]"),
        ({"outlier_scale": torch.ones(23)}, {}, r"outlier_scale is F32 \[23\]; scheme w4a8 needs F32 \[24\]"),
        ({"weight_packed": torch.zeros(24, 36, dtype=torch.int8)}, {}, r"weight_packed is I8 .* needs U8 \[24, 36\]"),
        ({"permutation": torch.zeros(200)}, {}, r"permutation is F32 \[200\]; needed is I16 or I32 \[200\]"),
        ({"permutation": None}, {}, r"permutation is missing, but its entry in quantization_config names it"),
        ({"bias": torch.zeros(24)}, {}, r"bias is there, but its entry in quantization_config lacks it"),
        ({}, {"in_features": 256}, r"weight_packed is U8 \[24, 36\]; scheme w4a8 needs U8 \[24, 64\]"),
        ({}, {"scheme": "w9"}, r"the scheme 'w9', which it doesn't define"),
        ({}, {"in_features": 100}, r"config\.json can't be read: 128 outlier channels leave no body"),
        ({}, {"out_features": None}, r"config\.json can't be read: int\(\) argument"),
    ],
)
def test_tensors_that_are_not_what_the_scheme_says(
    checkpoint: Path, change: dict[str, torch.Tensor | None], entry: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        verify_checkpoint(remake(checkpoint, change, entry))


def test_a_bias_and_signs_are_allowed_where_the_entry_names_them(checkpoint: Path) -> None:
    tensors = {"bias": torch.zeros(24, dtype=torch.bfloat16), "signs": torch.ones(200, dtype=torch.int8)}
    verify_checkpoint(remake(checkpoint, tensors, {"bias": True, "signs": True}))


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q["schemes"][SCHEME].update(outliers="many"),
        lambda q: q["linears"].update(nowhere={}),
        lambda q: q.update(schemes=[]),
        lambda q: q["kv_cache"].update(element="int3"),
    ],
)
def test_a_configuration_that_says_nothing_sensible(checkpoint: Path, change: Any) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    change(config["quantization_config"])
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"quantization_config in .*config\.json can't be read"):
        verify_checkpoint(remake(checkpoint, {}))


@pytest.mark.parametrize("file", [5, ["a"], "../elsewhere.safetensors"])
def test_an_index_names_files_beside_it(checkpoint: Path, file: Any) -> None:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = file
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="has no weight_map of tensor to a file beside it"):
        read_checkpoint(checkpoint)


def test_what_is_no_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(InputError, match="is not an atom checkpoint: it is not quantized"):
        read_checkpoint(write_model(tmp_path / "m"))
    gptq = write_model(tmp_path / "gptq", config={"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(InputError, match="it is quantized by gptq"):
        read_checkpoint(gptq)
    with pytest.raises(InputError, match="can't be read: No such file"):
        read_checkpoint(tmp_path / "nowhere")
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="of version 99"):
        read_checkpoint(checkpoint)
