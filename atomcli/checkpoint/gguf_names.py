"""From llama.cpp's tensor names to Hugging Face's, for the architectures atom knows.

Names of the source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#standardized-tensor-names
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType

from atomcli.errors import UnsupportedError

OUTER = MappingProxyType(
    {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
    }
)
BLOCK = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
# Mixture of experts, per model type: the router, and an expert's gate, up and down under {expert}.
ROUTER = MappingProxyType({"mixtral": "block_sparse_moe.gate", "qwen3_moe": "mlp.gate"})
EXPERTS = MappingProxyType(
    {
        "mixtral": {
            "gate": "block_sparse_moe.experts.{expert}.w1",
            "up": "block_sparse_moe.experts.{expert}.w3",
            "down": "block_sparse_moe.experts.{expert}.w2",
        },
        "qwen3_moe": {
            "gate": "mlp.experts.{expert}.gate_proj",
            "up": "mlp.experts.{expert}.up_proj",
            "down": "mlp.experts.{expert}.down_proj",
        },
    }
)
# Precomputed rotary factors: part of the config in Hugging Face's view, not a weight.
ROPE_FACTORS = "rope_freqs.weight"

_TENSOR = re.compile(r"(?:blk\.(?P<block>\d+)\.)?(?P<part>[a-z_]+)(?:\.(?P<expert>\d+))?\.(?P<kind>weight|bias)")
_STACKED = re.compile(r"ffn_(gate|up|down)_exps")


@dataclass(frozen=True)
class Placed:
    """Where a Hugging Face tensor lies: a GGUF tensor, or one expert's slice of a stacked one.

    `heads` > 0 says that its rows are interleaved for llama.cpp's rotary embedding, in that many heads.
    """

    tensor: str
    expert: int | None = None
    heads: int = 0


def place_tensors(
    tensors: Iterable[str], model_type: str, heads: int, kv_heads: int, experts: int
) -> dict[str, Placed]:
    """Hugging Face name -> place, for every tensor of the file; UnsupportedError names one that has no counterpart."""
    # llama.cpp permutes q and k of these only: the others already rotate halves as transformers does.
    permuted = model_type in {"llama", "mistral", "mixtral"}
    placed: dict[str, Placed] = {}
    for tensor in tensors:
        if tensor == ROPE_FACTORS:
            continue
        match = _TENSOR.fullmatch(tensor)
        targets = _targets(tensor, match, model_type, experts) if match else {}
        if not match or not targets:
            raise UnsupportedError(
                f"GGUF tensor {tensor} has no counterpart in a {model_type} model",
                "The file is of an architecture variant that atom doesn't know; use the model's safetensors.",
            )
        rows = {"attn_q": heads, "attn_k": kv_heads}.get(match["part"], 0) if permuted else 0
        for name, expert in targets.items():
            placed[name] = Placed(tensor, expert, rows)
    return placed


def _targets(tensor: str, match: re.Match[str], model_type: str, experts: int) -> dict[str, int | None]:
    """Hugging Face names of one GGUF tensor, each with the expert it is a slice for."""
    block, part, expert, kind = match["block"], match["part"], match["expert"], match["kind"]
    if block is None:
        return {f"{OUTER[part]}.{kind}": None} if part in OUTER and expert is None else {}
    prefix = f"model.layers.{block}."
    per_expert = EXPERTS.get(model_type, {})
    if expert is not None:
        # Early Mixtral files hold one tensor per expert: blk.0.ffn_gate.3.weight.
        role = part.removeprefix("ffn_")
        return {f"{prefix}{per_expert[role].format(expert=expert)}.{kind}": None} if role in per_expert else {}
    if part == "ffn_gate_inp" and model_type in ROUTER:
        return {f"{prefix}{ROUTER[model_type]}.{kind}": None}
    if (stacked := _STACKED.fullmatch(part)) and per_expert:
        template = per_expert[stacked[1]]
        return {f"{prefix}{template.format(expert=index)}.{kind}": index for index in range(experts)}
    return {f"{prefix}{BLOCK[part]}.{kind}": None} if part in BLOCK else {}
