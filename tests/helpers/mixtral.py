"""A real Mixtral, made of the demo model: each expert is the dense MLP plus 5 % noise, the router is random.

Its activations are those of a trained model, so experts see inputs as they occur in practice.
"""

import zlib
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import MixtralConfig

from atomcli.checkpoint.source import Source

EXPERTS = 4
NOISE = 0.05
_DENSE = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class DerivedMixtral(Source):
    """The Mixtral that a dense Llama source is turned into, one tensor at a time and the same at every reading."""

    def __init__(self, dense: Source) -> None:
        self.dense, self.name, self.path, self.dtype = dense, f"mixtral of {dense.name}", dense.path, dense.dtype
        self._read_mlp = lru_cache(len(_DENSE))(dense.read)  # of a block: all experts are made of the same three
        shared = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id eos_token_id pad_token_id"
        )
        options = {name: getattr(dense.config, name, None) for name in shared.split()}
        self.config = MixtralConfig(
            **options,
            rope_parameters=dense.config.rope_parameters,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
            architectures=["MixtralForCausalLM"],
            dtype=dense.dtype,
        )

    def names(self) -> frozenset[str]:
        names = {name for name in self.dense.names() if ".mlp." not in name}
        for index in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{index}.block_sparse_moe"
            names.add(f"{prefix}.gate.weight")
            names |= {f"{prefix}.experts.{expert}.{kind}.weight" for expert in range(EXPERTS) for kind in _DENSE}
        return frozenset(names)

    def shape(self, name: str) -> tuple[int, ...]:
        if name.endswith(".block_sparse_moe.gate.weight"):
            return EXPERTS, self.config.hidden_size
        return self.dense.shape(self._dense_name(name))

    def fingerprint(self) -> str:
        return f"mixtral-{self.dense.fingerprint()}"

    def save_companions(self, directory: Path) -> None:
        self.dense.save_companions(directory)
        self.config.save_pretrained(directory)

    def tokenizer(self):
        return self.dense.tokenizer()

    def _read(self, name: str) -> Tensor:
        if ".block_sparse_moe." not in name:
            return self.dense.read(name)
        noise = torch.randn(self.shape(name), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if name.endswith(".gate.weight"):
            return noise / self.config.hidden_size**0.5
        weight = self._read_mlp(self._dense_name(name)).float()
        return weight + NOISE * weight.std() * noise

    @staticmethod
    def _dense_name(name: str) -> str:
        if ".block_sparse_moe." not in name:
            return name
        block, _, rest = name.partition(".block_sparse_moe.experts.")
        return f"{block}.mlp.{_DENSE[rest.split('.')[1]]}.weight"
