"""Every family's tensors: the names and shapes of the descriptions are those of transformers' own classes."""

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from atomcli.errors import InputError, UnsupportedError
from atomcli.models.registry import FAMILIES, describe
from atomcli.models.tensors import account, block_shapes, block_tensors, outer_tensors
from atomcli.runtime.decoder import empty_block
from tests.helpers.tiny import NAMES, random_parent


@pytest.mark.parametrize("name", NAMES)
def test_description_matches_the_layer_class(name: str) -> None:
    _, source = random_parent(name)
    family = describe(source.config)
    for index in range(source.config.num_hidden_layers):
        state = empty_block(family, source.config, index).state_dict()
        assert {key: tuple(tensor.shape) for key, tensor in state.items()} == block_shapes(family, source.config, index)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_on_disk_is_accounted_for(name: str) -> None:
    _, source = random_parent(name)
    family = describe(source.config)
    accounted = account(family, source.config, source.names(), source.shape)
    linears = sum(len(family.linears(source.config, i)) for i in range(source.config.num_hidden_layers))
    assert len(accounted.quantizable) == linears
    assert set(accounted.quantizable.values()) | set(accounted.kept.values()) == source.names()
    assert all(tensor not in accounted.kept for tensor in accounted.quantizable)
    outer = set(outer_tensors(family, source.config))
    assert ("lm_head.weight" in outer) is not source.config.tie_word_embeddings
    blocks = [block_tensors(family, source.config, i).values() for i in range(source.config.num_hidden_layers)]
    assert outer.union(*blocks) == source.names()


def test_mixtral_is_renamed_on_disk() -> None:
    _, source = random_parent("mixtral")
    names = block_tensors(describe(source.config), source.config, 1)
    assert names["mlp.experts.3.down_proj.weight"] == "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    assert names["mlp.experts.0.up_proj.weight"] == "model.layers.1.block_sparse_moe.experts.0.w3.weight"
    assert names["mlp.gate.weight"] == "model.layers.1.block_sparse_moe.gate.weight"
    assert names["self_attn.q_proj.weight"] == "model.layers.1.self_attn.q_proj.weight"


def test_missing_left_over_and_misshapen_tensors_are_refused() -> None:
    _, source = random_parent("qwen2")
    family, config = describe(source.config), source.config
    bias = "model.layers.1.self_attn.k_proj.bias"
    with pytest.raises(InputError, match=f"lacks {bias}"):
        account(family, config, source.names() - {bias})
    with pytest.raises(InputError, match=r"model\.layers\.0\.adapter\.weight"):
        account(family, config, source.names() | {"model.layers.0.adapter.weight"})
    source.tensors[bias] = torch.zeros(3)
    with pytest.raises(InputError, match=rf"{bias} has shape \[3\]; the config says \[40\]"):
        account(family, config, source.names(), source.shape)


def test_known_duplicates_are_ignored() -> None:
    _, source = random_parent("llama")
    extra = {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    accounted = account(describe(source.config), source.config, source.names() | extra)
    assert accounted.ignored == extra


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 9}, "routes each token to 9 experts of 4"),
        ({"num_experts_per_tok": 0}, "routes each token to 0 experts of 4"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step 0"),
    ],
)
def test_routing_that_can_not_be_is_refused(change: dict[str, int], message: str) -> None:
    _, source = random_parent("qwen3_moe", num_hidden_layers=1)
    for key, value in change.items():
        setattr(source.config, key, value)
    with pytest.raises(InputError, match=message):
        account(describe(source.config), source.config, source.names())


def test_unknown_architecture_is_one_sentence() -> None:
    with pytest.raises(UnsupportedError, match="no description of GPT2LMHeadModel") as caught:
        describe(GPT2Config(architectures=["GPT2LMHeadModel"]))
    assert "LlamaForCausalLM" in caught.value.what
    assert "A description" in (caught.value.hint or "")


def test_model_type_decides_without_architectures() -> None:
    assert describe(LlamaConfig(architectures=None)).name == "llama"
    with pytest.raises(InputError, match="MixtralForCausalLM and the model_type llama"):
        describe(LlamaConfig(architectures=["MixtralForCausalLM"]))
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_sites_of_dense_and_sparse_blocks() -> None:
    _, source = random_parent("qwen3_moe")
    family = describe(source.config)
    dense, sparse = (family.sites(source.config, index) for index in (0, 1))
    assert [site.name for site in dense] == ["qkv", "o", "gate_up", "down"]
    assert dense[2].linears == ("mlp.gate_proj", "mlp.up_proj")
    assert not dense[2].expert
    assert sparse[3].expert
    assert sparse[3].of_expert(2) == ("mlp.experts.2.down_proj",)
    assert [fold.into for fold in family.folds(source.config, 1)][1] == sparse[2].linears
