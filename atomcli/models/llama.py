"""Llama 1 to 3.x, and the many models that are Llamas by architecture."""

from atomcli.models.block import Family

FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    module="transformers.models.llama.modeling_llama",
    prefix="Llama",
    attention_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
)
