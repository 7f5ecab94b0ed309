"""Qwen2 and Qwen2.5: biases on queries, keys and values; some layers may attend through a sliding window."""

from atomcli.models.block import Family

FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    module="transformers.models.qwen2.modeling_qwen2",
    prefix="Qwen2",
    attention_bias=True,
    sliding="layer_types",
)
