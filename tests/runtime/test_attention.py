"""Attention over a quantized cache: the same numbers with and without one, and really 4 bits in it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import StaticCache
from transformers.cache_utils import DynamicCache

from atomcli.errors import UnsupportedError, UsageError
from atomcli.formats.kv import dequantize_kv, quantize_kv
from atomcli.formats.scheme import KVFormat
from atomcli.runtime import decoder
from atomcli.runtime.attention import head_hadamard
from atomcli.runtime.cache import QuantizedKVLayer, cache_bytes
from tests.helpers.tiny import NAMES, random_parent, random_tokens

FORMATS = {
    "paper": KVFormat("int4", "before_rope", False, False),
    "before_rope_bias_free": KVFormat("int4", "before_rope", False, True),
    "after_rope": KVFormat("int4", "after_rope", False, False),
    "product": KVFormat("int4", "after_rope", True, True),
    "int8": KVFormat("int8", "after_rope", True, True),
}


def model_with(name: str, kv: KVFormat, **overrides: Any) -> Any:
    """In fp64, where the different sums of one and of many tokens don't push numbers over a rounding boundary."""
    return decoder.load_parent(random_parent(name, dtype=torch.float64, **overrides)[1], kv)


def cached_tail(model: Any, tokens: torch.Tensor, head: int, cache: Any) -> torch.Tensor:
    """Logits of tokens[:, head:], one token at a time after a prefill of `head`."""
    out = [model(tokens[:, :head], past_key_values=cache, use_cache=True).logits[:, -1:]]
    for position in range(head, tokens.shape[1]):
        out.append(model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("kv", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", ["llama_biased", "qwen2", "qwen3", "mistral"])
def test_cache_changes_nothing(name: str, kv: KVFormat) -> None:
    model = model_with(name, kv)
    tokens = random_tokens(2, 14)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits[:, 4:]
        cache = DynamicCache(config=model.config)
        logits = cached_tail(model, tokens, 5, cache)
    assert all(isinstance(layer, QuantizedKVLayer) for layer in cache.layers)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_other_caches_get_the_same_values() -> None:
    model = model_with("qwen2", FORMATS["before_rope_bias_free"], use_sliding_window=False)
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits[:, 4:]
        static = StaticCache(config=model.config, max_cache_len=32)
        torch.testing.assert_close(cached_tail(model, tokens, 5, static), expected, rtol=1e-4, atol=1e-4)
        lazy = DynamicCache()
        torch.testing.assert_close(cached_tail(model, tokens, 5, lazy), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(lazy.layers[1], QuantizedKVLayer)


def test_int8_is_close_to_the_parent_and_int4_less_so() -> None:
    own, source = random_parent("llama_biased")
    tokens = random_tokens()
    errors = {}
    with torch.no_grad():
        expected = own(tokens).logits
        for name, kv in FORMATS.items():
            logits = decoder.load_parent(source, kv)(tokens).logits
            errors[name] = ((logits - expected).norm() / expected.norm()).item()
    assert errors["int8"] < 0.01
    assert all(errors["int8"] < errors[name] < 0.3 for name in errors if name != "int8")


def test_cache_holds_four_bits() -> None:
    model = model_with("llama_biased", FORMATS["product"])
    with torch.no_grad():
        cache = model(random_tokens(3, 11), use_cache=True).past_key_values
    heads, dim, layers = 2, 20, 2
    vectors = 2 * layers * 3 * 11 * heads
    rotations = 2 * 11 * (dim // 2) * 8
    assert cache_bytes(cache) == vectors * (dim // 2 + 2 + 2) + rotations
    layer = cache.layers[1]
    assert layer.keys.dtype == torch.uint8
    assert layer.keys.shape == (3, heads, 11, dim // 2)
    assert layer.rotations is cache.layers[0].rotations


def test_bias_free_storage_matters_where_biases_are_large() -> None:
    """A key bias far above the keys eats the 4-bit range; stored without it, nothing is lost."""
    own, source = random_parent("qwen2", use_sliding_window=False)
    for name, tensor in source.tensors.items():
        if name.endswith("k_proj.bias"):
            tensor.copy_(torch.randn(tensor.shape) * 30)
            own.get_submodule(name.removesuffix(".bias")).bias.data.copy_(tensor)
    tokens = random_tokens()
    with torch.no_grad():
        expected = own(tokens).logits

        def error(kv: KVFormat) -> float:
            return ((decoder.load_parent(source, kv)(tokens).logits - expected).norm() / expected.norm()).item()

        assert error(FORMATS["product"]) < 0.3 * error(FORMATS["after_rope"])


def test_hadamard_over_a_bias_is_refused() -> None:
    kv = KVFormat("int4", "after_rope", True, False)
    _, source = random_parent("qwen2")
    with pytest.raises(UnsupportedError, match="still contain their projection bias"):
        decoder.load_parent(source, kv)
    _, plain = random_parent("llama")
    decoder.load_parent(plain, kv)
    _, normed = random_parent("qwen3", attention_bias=True)
    with pytest.raises(UnsupportedError, match="normalized after their bias"):
        decoder.load_parent(normed, FORMATS["product"])


@pytest.mark.parametrize("name", NAMES)
def test_generate_uses_the_quantized_cache_by_default(name: str) -> None:
    model = model_with(name, FORMATS["product"])
    tokens = random_tokens(2, 7)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "do_sample": False}
    out = model.generate(tokens, return_dict_in_generate=True, **options)
    assert all(isinstance(layer, QuantizedKVLayer) for layer in out.past_key_values.layers)
    assert torch.equal(out.sequences, model.generate(tokens, use_cache=False, **options))


@pytest.mark.parametrize("kv", [FORMATS["product"], FORMATS["paper"]], ids=["product", "paper"])
def test_beam_search_reorders_the_cache(kv: KVFormat) -> None:
    model = model_with("llama_biased", kv)
    short, long = random_tokens(1, 5, seed=1), random_tokens(1, 8, seed=2)
    batch = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1), long])
    mask = (batch != 0).long()
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    with_cache = model.generate(batch, **options)
    assert torch.equal(with_cache, model.generate(batch, use_cache=False, **options))


def test_cropping_and_selecting_follow_the_tokens() -> None:
    model = model_with("llama_biased", FORMATS["paper"])
    tokens = random_tokens(3, 12)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits[1:, 9:]
        cache = DynamicCache(config=model.config)
        model(tokens, past_key_values=cache, use_cache=True)
        cache.crop(-4)
        cache.batch_select_indices(torch.tensor([1, 2]))
        assert cache.get_seq_length() == 8
        logits = cached_tail(model, tokens[1:, 8:], 2, cache)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache_bytes(cache) == 0


@pytest.mark.parametrize("kv", [FORMATS["product"], FORMATS["paper"]], ids=["product", "paper"])
def test_rows_keep_their_own_positions(kv: KVFormat) -> None:
    """Rows padded to different lengths are swapped and repeated in the cache: each takes its rotations along."""
    model = model_with("llama_biased", kv)
    tokens = random_tokens(2, 10)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    rows = torch.tensor([1, 0])
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        for change, expected in (
            (lambda cache: cache.batch_select_indices(rows), whole[rows]),
            (lambda cache: cache.reorder_cache(rows), whole[rows]),
            (lambda cache: cache.batch_repeat_interleave(2), whole.repeat_interleave(2, dim=0)),
        ):
            cache = DynamicCache(config=model.config)
            state = {"past_key_values": cache, "use_cache": True}
            model(tokens[:, :9], attention_mask=mask[:, :9], position_ids=positions[:, :9], **state)
            change(cache)
            chosen = rows if expected.shape[0] == 2 else torch.tensor([0, 0, 1, 1])
            last = model(tokens[chosen, 9:], attention_mask=mask[chosen], position_ids=positions[chosen, 9:], **state)
            torch.testing.assert_close(last.logits[:, -1], expected, rtol=1e-4, atol=1e-4)


def test_a_sliding_layer_frees_what_no_query_sees() -> None:
    model = model_with("mistral", FORMATS["product"])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_tokens(1, 20), past_key_values=cache, use_cache=True)
    assert cache.layers[0].keys.shape[2] == model.config.sliding_window - 1
    assert cache.get_seq_length() == 20
    with pytest.raises(RuntimeError, match="can't be cropped"):
        cache.crop(-1)


def test_stored_values_are_those_of_the_format() -> None:
    model = model_with("llama", KVFormat("int4", "after_rope", False, True))
    attention = model.model.layers[0].self_attn
    tokens = random_tokens(1, 6)
    seen: list[torch.Tensor] = []
    attention.v_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    value = seen[0].view(1, 6, 2, 24).transpose(1, 2)
    codes, scale, minimum = quantize_kv(value, "int4")
    layer = cache.layers[0]
    assert torch.equal(layer.values, codes)
    assert torch.equal(layer.value_scale, scale)
    assert torch.equal(layer.value_minimum, minimum)


def centered(model: Any, spread: float = 1.0) -> Any:
    """The model with a centered cache, whose centers are anything."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.kv = replace(attention.kv, centered=True)
        shape = (attention.k_proj.out_features // attention.head_dim, attention.head_dim)
        attention.key_center = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
    return model


@pytest.mark.parametrize("name", ["llama_biased", "qwen3"])
def test_softmax_does_not_see_the_center(name: str) -> None:
    """In 8 bits a small center moves next to nothing, although no key is given it back, with a cache and without."""
    tokens = random_tokens(2, 14)
    with torch.no_grad():
        expected = model_with(name, FORMATS["int8"])(tokens, use_cache=False).logits[:, 4:]
        model = centered(model_with(name, FORMATS["int8"]), 0.1)
        found = model(tokens, use_cache=False).logits[:, 4:]
        torch.testing.assert_close(found, expected, rtol=0, atol=0.1 * float(expected.std()))
        cached = cached_tail(model, tokens, 5, DynamicCache(config=model.config))
        torch.testing.assert_close(cached, found, rtol=1e-4, atol=1e-4)


def test_the_center_is_what_is_not_stored() -> None:
    """Keys that all lie around one far vector lose nothing of what tells them apart."""
    model = model_with("llama", FORMATS["product"])
    attention = model.model.layers[0].self_attn
    seen: list[torch.Tensor] = []
    attention.key_observer = seen.append
    tokens = random_tokens(2, 30)
    with torch.no_grad():
        plain = model(tokens, use_cache=False).logits
        mean = seen[0].mean(dim=(0, 2))
        assert mean.shape == (attention.k_proj.out_features // attention.head_dim, attention.head_dim)
        keys = head_hadamard(seen[0].double())
        attention.kv = replace(attention.kv, centered=True)
        attention.key_center = head_hadamard(mean)
        cache = DynamicCache(config=model.config)
        model(tokens, past_key_values=cache, use_cache=True)
    layer: Any = cache.layers[0]
    stored = dequantize_kv(layer.keys, layer.key_scale, layer.key_minimum, "int4")
    assert float((stored.mean(dim=(0, 2)) - 0).abs().max()) < 0.2 * float(keys.std())
    assert torch.allclose(stored + attention.key_center[:, None], keys.float(), atol=float(keys.std()))
    assert plain.shape == (2, 30, model.config.vocab_size)


def test_keys_before_rope_have_no_center() -> None:
    with pytest.raises(UsageError, match="after RoPE"):
        KVFormat("int4", "before_rope", centered=True)
