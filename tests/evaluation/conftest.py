"""A tiny random Llama and a tokenizer whose words are w0 … w95."""

from collections.abc import Callable
from typing import Any

import pytest


def make_model(seed: int = 0, vocabulary: int = 97) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_maker() -> Callable[..., Any]:
    return make_model


@pytest.fixture(scope="session")
def tiny_model() -> Any:
    return make_model()


@pytest.fixture(scope="session")
def other_model() -> Any:
    return make_model(seed=1)


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"</s>": 0, **{f"w{index}": index + 1 for index in range(96)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
