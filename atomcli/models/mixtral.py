"""Mixtral: a Mistral whose MLP is a mixture of experts; on disk w1, w3, w2 are gate, up and down."""

from atomcli.models.block import Experts, Family

FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    module="transformers.models.mixtral.modeling_mixtral",
    prefix="Mixtral",
    sliding="config",
    experts=Experts("num_local_experts", "intermediate_size", "block_sparse_moe", ("w1", "w3", "w2")),
)
