"""Tiny random models of every family, as sources, and quantized checkpoints made of them by rounding to nearest."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from atomcli.algorithms.rounding import round_to_nearest, unrounded
from atomcli.formats.scheme import KVFormat, Scheme
from atomcli.models.registry import describe
from atomcli.models.tensors import block_name, outer_tensors
from atomcli.runtime.decoder import FLOAT_CACHE, quantize_linear, read_block, read_outer
from atomcli.runtime.linear import QuantLinear, input_layout

VOCABULARY = 97

# Hidden and intermediate sizes leave ragged groups, head_dim is not always hidden / heads, keys are shared by heads.
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 80,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"head_dim": 24, "tie_word_embeddings": True}),
    "llama_biased": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": 6, "head_dim": 16}),
    "qwen2": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "head_dim": 20}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "mlp_only_layers": [0],
            "head_dim": 16,
            "norm_topk_prob": True,
        },
    ),
}
NAMES = tuple(CONFIGS)


class MemorySource:
    """A source whose tensors lie in memory, under their names on disk."""

    def __init__(self, config: PreTrainedConfig, tensors: dict[str, Tensor]) -> None:
        self.config, self.tensors = config, tensors
        self.dtype = next(iter(tensors.values())).dtype

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def random_parent(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> tuple[PreTrainedModel, Any]:
    """transformers' own model with random weights, biases and norms, and the same model as a source."""
    config_class, own = CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**(_SHAPE | own | overrides)), dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 and parameter.mean() == 1 else 0.0, 0.15)
        parameter.requires_grad_(False)
    model.tie_weights()
    model.config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        tensors = load_file(Path(directory) / "model.safetensors")
    return model, MemorySource(model.config, tensors)


def random_tokens(rows: int = 2, columns: int = 17, seed: int = 0) -> Tensor:
    """Token ids (rows, columns), none of them the padding token."""
    return torch.randint(2, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


def random_layout_tensors(scheme: Scheme, in_features: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """A random permutation, and random signs where the scheme has a Hadamard."""
    generator = torch.Generator().manual_seed(seed)
    permutation = torch.randperm(in_features, generator=generator)
    if scheme.transform == "none":
        return permutation, None
    return permutation, (torch.randint(0, 2, (in_features,), generator=generator) * 2 - 1).to(torch.int8)


def quantized_block(
    source: Any, index: int, scheme: Scheme, kv: KVFormat, skip: tuple[str, ...] = (), permute: bool = True
) -> Any:
    """A block whose linears, but those in `skip`, are rounded to nearest; the linears of a site share a layout."""
    config = source.config
    family = describe(config)
    block = read_block(family, index, source, kv)
    for number, site in enumerate(family.sites(config, index)):
        experts = range(family.expert_count(config, index)) if site.expert else (0,)
        for name in [linear for expert in experts for linear in site.of_expert(expert)]:
            if name in skip:
                continue
            linear = block.get_submodule(name)
            permutation, signs = random_layout_tensors(scheme, linear.in_features, number)
            layout = input_layout(scheme, linear.in_features, permutation if permute else None, signs)
            weight = layout.apply(linear.weight.float())
            if scheme.weights.element == "float":
                quantized = unrounded(weight, scheme, source.dtype)
            else:
                quantized = round_to_nearest(weight, torch.ones(linear.in_features), scheme, 1.0)
            quantize_linear(block, name, QuantLinear.from_weight(quantized, layout, linear.bias))
    return block


def write_checkpoint(
    directory: Path,
    source: Any,
    scheme: Scheme,
    kv: KVFormat = FLOAT_CACHE,
    skip: tuple[str, ...] = (),
    permute: bool = True,
) -> PreTrainedModel:
    """Write a quantized checkpoint and answer the model it was written from, put together block by block."""
    config = source.config
    family = describe(config)
    model = read_outer(family, source)
    tensors = {name: model.state_dict()[name] for name in outer_tensors(family, config)}
    linears: dict[str, Any] = {}
    for index in range(config.num_hidden_layers):
        block = quantized_block(source, index, scheme, kv, skip, permute)
        prefix = block_name(index)
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in block.state_dict().items()}
        for name, module in block.named_modules():
            if isinstance(module, QuantLinear):
                linears[f"{prefix}.{name}"] = module.entry("all")
        model.model.layers.append(block)
    directory.mkdir(parents=True, exist_ok=True)
    half = len(tensors) // 2
    names = list(tensors)
    index_map = {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        file = f"model-{number:05d}.safetensors"
        save_file({name: tensors[name].clone() for name in part}, directory / file, metadata={"format": "pt"})
        index_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index_map}))
    saved = config.to_dict() | {
        "dtype": str(source.dtype).removeprefix("torch."),
        "quantization_config": {
            "quant_method": "atom",
            "version": 1,
            "schemes": {"all": scheme.to_dict()},
            "linears": linears,
            "kv_cache": kv.to_dict(),
            "kept": [],
        },
    }
    (directory / "config.json").write_text(json.dumps(saved))
    return model
