"""The paged cache in transformers' hands: forward passes and `generate` give what the dequantizing cache gives.

The kernels' reference stands in for them here, so that their road runs on a CPU.
"""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from atomcli.errors import RunError, UnsupportedError
from atomcli.kernels.pages import PageFormat
from atomcli.runtime.cache import QuantizedKVLayer, cache_bytes
from atomcli.runtime.paged_cache import PagedLayer
from tests.helpers.fused import KV8, tiny_model
from tests.helpers.tiny import random_tokens

NAMES = ("llama", "mistral", "qwen2", "qwen3", "mixtral")


@pytest.fixture
def paged(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls something with kernels that seem to serve it."""

    def call(function: Any, *arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr("atomcli.runtime.attention.why_not", lambda *_: None)
            return function(*arguments, **options)

    return call


def padded(lengths: tuple[int, ...], left: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of these lengths in one batch, and their attention mask."""
    tokens = random_tokens(len(lengths), max(lengths))
    columns = torch.arange(max(lengths))
    ends = torch.tensor(lengths)[:, None]
    mask = columns >= max(lengths) - ends if left else columns < ends
    return tokens * mask, mask.long()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [(70, 70), (70, 3, 64)], ids=["even", "padded"])
def test_generate_gives_the_same_tokens(paged: Any, name: str, lengths: tuple[int, ...]) -> None:
    model = tiny_model(name, None, KV8)
    tokens, mask = padded(lengths)
    options: dict[str, Any] = {
        "attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True
    }  # fmt: skip
    expected = model.generate(tokens, **options)
    out = paged(model.generate, tokens, **options)
    assert torch.equal(out.sequences, expected.sequences)
    cache = out.past_key_values
    assert all(isinstance(layer, PagedLayer) for layer in cache.layers)
    assert all(isinstance(layer, QuantizedKVLayer) for layer in expected.past_key_values.layers)
    heads = model.config.num_key_value_heads
    assert cache_bytes(cache) % (heads * cache.layers[0].format.bytes * len(cache.layers)) == 0


def test_pages_are_a_fraction_of_sixteen_bits(paged: Any) -> None:
    model = tiny_model("llama")  # a 4-bit cache
    cache = paged(model, random_tokens(2, 200)).past_key_values
    per_token = cache_bytes(cache) / (2 * 2 * 2 * 64 * cache.layers[0].sequences.width)
    assert per_token == 2 * (32 // 2 + 4)  # codes, and two fp16 numbers


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_is_neither_stored_nor_attended_to(paged: Any, left: bool) -> None:
    model = tiny_model("llama", None, KV8)
    tokens, mask = padded((40, 9), left)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = paged(model, tokens, attention_mask=mask, position_ids=positions)
    assert out.past_key_values.layers[0].sequences.lengths.tolist() == [40, 9]
    alone = paged(model, tokens[1:, mask[1].bool()])
    torch.testing.assert_close(out.logits[1, mask[1].bool()], alone.logits[0], rtol=1e-3, atol=1e-3)


def test_beams_reorder_rows(paged: Any) -> None:
    model = tiny_model("llama", None, KV8)
    tokens, mask = padded((20, 70))
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "num_beams": 3}
    assert torch.equal(paged(model.generate, tokens, **options), model.generate(tokens, **options))


def test_a_cropped_cache_goes_on_as_if_nothing_had_been(paged: Any) -> None:
    model = tiny_model("llama", None, KV8)
    tokens, mask = padded((70, 30))

    def logits(crop: int) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        model(tokens, attention_mask=mask, past_key_values=cache)
        extra = torch.cat([mask, torch.ones(2, crop, dtype=torch.long)], dim=1)
        if crop:
            model(tokens[:, :crop], attention_mask=extra, past_key_values=cache)
            cache.crop(-crop)
        more = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        out: torch.Tensor = model(tokens[:, :1], attention_mask=more, past_key_values=cache).logits
        return out

    torch.testing.assert_close(paged(logits, 5), paged(logits, 0), rtol=1e-4, atol=1e-4)


def test_a_reset_cache_is_empty(paged: Any) -> None:
    model = tiny_model("llama", None, KV8)
    cache = DynamicCache(config=model.config)
    first = paged(model, random_tokens(2, 30), past_key_values=cache).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(paged(model, random_tokens(2, 30), past_key_values=cache).logits, first)


def test_a_mask_that_kernels_cannot_follow_is_refused(paged: Any) -> None:
    model: PreTrainedModel = tiny_model("llama", None, KV8)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    mask[..., 5, 2] = False
    with pytest.raises(UnsupportedError, match="hides more than padding"):
        paged(model, random_tokens(1, 8), attention_mask=mask)


def test_out_of_memory_names_what_would_fit(paged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", None, KV8)
    tokens = random_tokens(4, 90)
    fmt, heads = PageFormat("int8", 32), model.config.num_key_value_heads
    page = model.config.num_hidden_layers * heads * fmt.bytes
    monkeypatch.setattr("atomcli.runtime.memory.free_bytes", lambda device: 13 * page)
    with pytest.raises(RunError, match=r"A cache of 1536 tokens takes .* GB; .* GB are free") as raised:
        paged(model.generate, tokens, max_new_tokens=2)
    assert raised.value.hint == "6 × 90 or 4 × 192 tokens would fit."
