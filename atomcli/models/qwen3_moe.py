"""Qwen3-MoE: Qwen3's attention with experts in every block, every n-th block, or all but some."""

from atomcli.models.block import Experts, Family

FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    module="transformers.models.qwen3_moe.modeling_qwen3_moe",
    prefix="Qwen3Moe",
    attention_bias="attention_bias",
    output_bias="attention_bias",
    head_norms=True,
    sliding="config",
    experts=Experts("num_experts", "moe_intermediate_size"),
)
