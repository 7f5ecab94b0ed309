"""Tiny model directories and checkpoints whose tensors are random, to be read and to be damaged."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from atomcli.checkpoint import writer
from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import SCHEMES, KVFormat
from atomcli.formats.weights import QuantizedWeight, tensor_layout

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 24,
    "tie_word_embeddings": True,
}


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (24, 16), "model.norm.weight": (16,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + "self_attn.q_proj.weight": (16, 16), prefix + "mlp.down_proj.weight": (16, 32)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_model(
    directory: Path,
    dtype: torch.dtype = torch.bfloat16,
    sharded: bool = False,
    config: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    """A model directory as save_pretrained would leave it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    tensors = weights(dtype) if tensors is None else tensors
    if not sharded:
        save_file(tensors, directory / "model.safetensors")
        return directory
    names = sorted(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    parts = {files[0]: names[::2], files[1]: names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


SCHEME = "w4a8"
LINEARS = {"model.layers.0.self_attn.q_proj": (24, 200), "model.layers.1.self_attn.q_proj": (16, 200)}


def random_weight(scheme_name: str, rows: int, columns: int, seed: int = 0) -> QuantizedWeight:
    """A weight with random codes and plausible scales, in the scheme of that name."""
    scheme = SCHEMES[scheme_name]
    generator = torch.Generator().manual_seed(seed)
    fields: dict[str, torch.Tensor] = {}
    for spec in tensor_layout(scheme, rows, columns):
        if spec.dtype in (torch.uint8, torch.int8):
            low, high = {"group_scales": (-15, 16) if spec.dtype == torch.int8 else (120, 130)}.get(
                spec.field, (0, 256) if spec.dtype == torch.uint8 else (-127, 128)
            )
            fields[spec.field] = torch.randint(low, high, spec.shape, generator=generator).to(spec.dtype)
        else:
            fields[spec.field] = (torch.rand(spec.shape, generator=generator) + 0.5).to(spec.dtype)
    return QuantizedWeight(scheme, (rows, columns), **fields)


def input_layout(scheme_name: str, columns: int, seed: int = 1) -> InputLayout:
    scheme = SCHEMES[scheme_name]
    generator = torch.Generator().manual_seed(seed)
    permutation = torch.randperm(columns, generator=generator)
    hadamard = scheme.transform == "hadamard"
    return InputLayout(columns, scheme.outliers, scheme.hadamard_block, permutation, None, hadamard)


def write_checkpoint(out: Path, scheme_name: str = SCHEME) -> Path:
    """A checkpoint of two blocks with one linear each, written and published as the compress road does."""
    directory = writer.unfinished(out)
    directory.mkdir()
    entries = {}
    records = [writer.write_shard(directory, writer.shard_file(None), {"model.norm.weight": torch.ones(16)})]
    for block, (linear, (rows, columns)) in enumerate(LINEARS.items()):
        weight = random_weight(scheme_name, rows, columns, seed=block)
        tensors = {f"{linear}.{suffix}": tensor for suffix, tensor in weight.tensors().items()}
        permutation = input_layout(scheme_name, columns).permutation
        assert permutation is not None
        tensors[f"{linear}.permutation"] = permutation.to(torch.int16)
        records.append(writer.write_shard(directory, writer.shard_file(block), tensors))
        entries[linear] = {
            "scheme": scheme_name,
            "in_features": columns,
            "out_features": rows,
            "permutation": True,
        }
    quantization = {
        "quant_method": "atom",
        "version": 1,
        "schemes": {scheme_name: SCHEMES[scheme_name].to_dict()},
        "linears": entries,
        "kv_cache": KVFormat().to_dict(),
        "kept": ["model.norm.weight"],
    }
    (directory / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}))
    writer.finish(directory, records)
    writer.publish(directory, out)
    return out
