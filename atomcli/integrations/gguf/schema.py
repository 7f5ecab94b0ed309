"""What llama.cpp can hold of a checkpoint: two types of weights, its own activations, its own names and keys."""

import math
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from atomcli.errors import UnsupportedError
from atomcli.formats.scheme import ActivationFormat, Element, Scheme, WeightFormat
from atomcli.integrations.portable import Target
from atomcli.models.block import head_dim

# Both cut rows into blocks of 32 with an fp16 scale; integer formats with other groups repeat theirs.
BLOCK = 32
TYPES = {"int4": "Q4_0", "int8": "Q8_0"}
# llama.cpp's name of an architecture, by model_type. Mistral and Mixtral are Llamas to it.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}


def held_weights(format: WeightFormat, in_features: int) -> WeightFormat | None:
    """Q4_0 for INT4 and E2M1, Q8_0 for INT8: blocks of 32 channels, which must cut the row evenly."""
    if format.element == "float":
        return format
    if in_features % BLOCK:
        return None
    element: Element = "int8" if format.element == "int8" else "int4"
    if format.element == element and (format.group or BLOCK) % BLOCK:
        return None  # groups of 16: two scales where a block has one
    return WeightFormat(element, BLOCK, "fp16")


def held_activations(format: ActivationFormat, in_features: int) -> ActivationFormat | None:
    """None but 16 bits: how activations are rounded is llama.cpp's business, not the file's."""
    return format if format.element == "float" else None


TARGET = Target("gguf", held_weights, held_activations)


def type_of(scheme: Scheme) -> str:
    """llama.cpp's type for the weights of a plain scheme."""
    return TYPES[scheme.weights.element]


def metadata(config: PreTrainedConfig) -> dict[str, Any]:
    """The keys of a model, without its architecture's prefix; UnsupportedError for what llama.cpp computes otherwise.

    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#llm
    """
    dim = head_dim(config)
    keys: dict[str, Any] = {
        "context_length": int(config.max_position_embeddings),
        "embedding_length": int(config.hidden_size),
        "block_count": int(config.num_hidden_layers),
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count": int(config.num_attention_heads),
        "attention.head_count_kv": int(config.num_key_value_heads),
        "attention.key_length": dim,
        "attention.value_length": dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": int(config.vocab_size),
    }
    _refuse_windows(config)
    if config.model_type == "mixtral":
        keys |= {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}
    if config.model_type == "qwen3_moe":
        if config.mlp_only_layers or config.decoder_sparse_step != 1 or not config.norm_topk_prob:
            raise UnsupportedError(
                "llama.cpp has experts in every block of a Qwen3-MoE and normalises their weights; this model doesn't"
            )
        keys |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    return keys | _rope(config.rope_parameters)


def rotary_factors(config: PreTrainedConfig) -> np.ndarray | None:
    """Llama 3.1's factors of the rotary frequencies, fp32 (head_dim / 2,), which llama.cpp wants as a tensor."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    dim, original = head_dim(config), rope["original_max_position_embeddings"]
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):
        return {}
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(f"The rotary embedding is scaled by {kind!r}, which GGUF has no key for")
    keys = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    return keys


def _refuse_windows(config: PreTrainedConfig) -> None:
    sliding = [kind for kind in getattr(config, "layer_types", None) or () if kind == "sliding_attention"]
    everywhere = config.model_type in ("mistral", "mixtral", "qwen3_moe") and getattr(config, "sliding_window", None)
    if sliding or everywhere:
        raise UnsupportedError(
            f"The model attends through a window of {config.sliding_window} tokens, which llama.cpp ignores for "
            f"{config.model_type}",
            "Export it to compressed-tensors.",
        )
