"""Mistral: a Llama without biases whose layers may all attend through a sliding window."""

from atomcli.models.block import Family

FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    module="transformers.models.mistral.modeling_mistral",
    prefix="Mistral",
    sliding="config",
)
