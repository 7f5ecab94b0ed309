"""Qwen3: queries and keys are normalized per head before RoPE."""

from atomcli.models.block import Family

FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    module="transformers.models.qwen3.modeling_qwen3",
    prefix="Qwen3",
    attention_bias="attention_bias",
    output_bias="attention_bias",
    head_norms=True,
    sliding="layer_types",
)
