"""A real mixture of experts, block by block: it predicts text as its dense parent does, and survives 8 bits."""

from typing import Any

import pytest
import torch

from atomcli.checkpoint.assets import demo_text
from atomcli.checkpoint.source import open_source
from atomcli.formats.scheme import SCHEMES, KVFormat
from atomcli.models.registry import describe
from atomcli.models.tensors import account
from atomcli.runtime import decoder
from tests.helpers.mixtral import DerivedMixtral
from tests.helpers.tiny import quantized_block

TOKENS = 192


def perplexity(frame: Any, hidden: torch.Tensor, tokens: torch.Tensor) -> float:
    logits = decoder.logits(frame, hidden)[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).exp().item()


@pytest.mark.slow
@torch.inference_mode()
def test_mixtral_made_of_the_demo_model() -> None:
    dense = open_source("demo")
    mixtral = DerivedMixtral(dense)
    family, dense_family = describe(mixtral.config), describe(dense.config)
    accounted = account(family, mixtral.config, mixtral.names(), mixtral.shape)
    assert len(accounted.quantizable) == 30 * (4 + 3 * 4)

    text = demo_text("held_out").read_text(encoding="utf-8")[:4000]
    tokens = dense.tokenizer()(text, return_tensors="pt").input_ids[:, :TOKENS]
    frame = decoder.read_outer(family, mixtral)
    streams = {name: decoder.embed(frame, tokens) for name in ("dense", "mixture", "quantized")}
    for index in range(mixtral.config.num_hidden_layers):
        blocks = {
            "dense": decoder.read_block(dense_family, index, dense),
            "mixture": decoder.read_block(family, index, mixtral),
            "quantized": quantized_block(mixtral, index, SCHEMES["w8a8"], KVFormat("int8", "after_rope", True, True)),
        }
        for name, block in blocks.items():
            arguments = decoder.block_arguments(frame, family, index, streams[name])
            streams[name] = block(streams[name], **arguments)
    ppl = {name: perplexity(frame, hidden, tokens) for name, hidden in streams.items()}
    assert ppl["dense"] < 60
    assert ppl["mixture"] < 1.15 * ppl["dense"]
    assert ppl["quantized"] < 1.15 * ppl["mixture"]
    assert ppl["quantized"] != ppl["mixture"]
