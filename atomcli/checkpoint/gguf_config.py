"""A transformers config from the metadata of a GGUF file.

Written out here, rather than asked of transformers, because its GGUF reader ignores what decides correctness: the
rotary factors of Llama 3.1 and later (a tensor, not a metadata key), rope scaling, and Mixtral's experts.
"""

import math
from collections.abc import Callable, Container, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from atomcli.checkpoint.gguf_names import ROPE_FACTORS
from atomcli.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# general.architecture -> (dense model type, model type when there are experts)
MODEL_TYPES: dict[str, tuple[str | None, str | None]] = {
    "llama": ("llama", "mixtral"),
    "mistral": ("mistral", "mixtral"),
    "qwen2": ("qwen2", None),
    "qwen3": ("qwen3", None),
    "qwen3moe": (None, "qwen3_moe"),
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_HIDDEN = "embedding_length"
_HEADS = "attention.head_count"


def build_config(
    metadata: Mapping[str, Any],
    tensors: Container[str],
    read_factors: Callable[[], np.ndarray],
    where: str,
    vocabulary: int = 0,
) -> "PreTrainedConfig":
    """The config of a GGUF model in bfloat16; `read_factors` reads the rotary factors where the file has them.

    vocabulary: rows of the embedding, which is what files go by whose metadata don't say a vocabulary's size.

    Raises UnsupportedError for an architecture or rope scaling that can't be expressed, InputError for absent keys.
    """
    from transformers import AutoConfig

    architecture = metadata.get("general.architecture")
    dense, mixture = MODEL_TYPES.get(str(architecture), (None, None))
    experts = int(metadata.get(f"{architecture}.expert_count", 0))
    model_type = mixture if experts else dense
    if model_type is None:
        raise UnsupportedError(
            f"{where} is of architecture {architecture!r}{' with experts' if experts else ''}, "
            f"and atom reads GGUF files of {', '.join(MODEL_TYPES)}",
            "Use the model's safetensors.",
        )

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise InputError(
                f"{where} has no metadata key {architecture}.{key}", "The file is incomplete; get it again."
            )
        return value

    heads = int(get(_HEADS))
    hidden = int(get(_HIDDEN))
    head_dim = int(get("attention.key_length", metadata.get(f"{architecture}.rope.dimension_count", hidden // heads)))
    theta = _decimal(get("rope.freq_base", 10000.0))
    fields: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "dtype": "bfloat16",
        "vocab_size": int(metadata.get(f"{architecture}.vocab_size") or vocabulary),
        "hidden_size": hidden,
        "intermediate_size": int(get("feed_forward_length")),
        "num_hidden_layers": int(get("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(get("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "max_position_embeddings": int(get("context_length")),
        "rms_norm_eps": _decimal(get("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if model_type == "llama":
        fields["attention_bias"] = "blk.0.attn_q.bias" in tensors
        fields["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    window = metadata.get(f"{architecture}.attention.sliding_window")
    if model_type in {"mistral", "mixtral"}:
        fields["sliding_window"] = int(window) if window else None
    if model_type == "mixtral":
        fields |= {"num_local_experts": experts, "num_experts_per_tok": int(get("expert_used_count"))}
    if model_type == "qwen3_moe":
        fields |= {
            "num_experts": experts,
            "num_experts_per_tok": int(get("expert_used_count")),
            "moe_intermediate_size": int(get("expert_feed_forward_length")),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            # llama.cpp always normalises the chosen experts' weights for this architecture.
            "norm_topk_prob": True,
        }
    for key in ("bos", "eos", "padding"):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        fields[f"{'pad' if key == 'padding' else key}_token_id"] = None if token is None else int(token)
    factors = read_factors() if ROPE_FACTORS in tensors else None
    fields["rope_parameters"] = _rope(metadata, str(architecture), theta, head_dim, factors, where)
    return AutoConfig.for_model(model_type, **fields)


def _rope(
    metadata: Mapping[str, Any], architecture: str, theta: float, head_dim: int, factors: np.ndarray | None, where: str
) -> dict[str, Any]:
    prefix = f"{architecture}.rope.scaling."
    kind = metadata.get(prefix + "type", "none")
    if factors is not None:
        return {"rope_theta": theta, **_llama3_parameters(factors, theta, head_dim, where)}
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    factor = _decimal(metadata.get(prefix + "factor", 1.0))
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    original = metadata.get(prefix + "original_context_length")
    if kind == "yarn" and original:
        return {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": int(original),
        }
    raise UnsupportedError(
        f"{where} uses rope scaling {kind!r}, which atom can't read from GGUF", "Use its safetensors."
    )


def _llama3_parameters(factors: np.ndarray, theta: float, head_dim: int, where: str) -> dict[str, Any]:
    """Llama 3.1's rope parameters from the per-frequency factors that llama.cpp stores in their place.

    The released models differ only in `factor` (8 for 3.1, 32 for 3.2); it is the largest stored value.
    """
    low, high, original = 1.0, 4.0, 8192
    factor = float(factors.max())
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise UnsupportedError(
            f"{where} holds rotary factors ({ROPE_FACTORS}) that are not those of Llama 3.1 or 3.2",
            "Use the model's safetensors.",
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _decimal(value: Any) -> float:
    """The shortest decimal that is this fp32 number: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))
