"""The fused runtime computes what transformers' modules around our linears and attention compute."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from atomcli.errors import UnsupportedError
from atomcli.formats.scheme import SCHEMES, KVFormat, Scheme
from atomcli.runtime.fused import FusedModel
from tests.helpers.fused import KV4, KV8, W4A4, fused_logits, tiny_model
from tests.helpers.tiny import NAMES, random_tokens

TOKENS = 70  # more than a page


def error(got: Tensor, want: Tensor) -> Tensor:
    """Relative error of each token's logits."""
    return (got - want).norm(dim=-1) / want.norm(dim=-1)


@pytest.fixture(autouse=True)
def no_gradients() -> object:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize(
    "kv",
    [KV4, KVFormat("int8", "before_rope"), KVFormat("int4", "before_rope", False, False)],
    ids=["int4-hadamard", "int8-before-rope", "int4-with-bias"],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_quantized_model_gives_the_logits_of_its_modules(name: str, kv: KVFormat) -> None:
    model = tiny_model(name, W4A4, kv)
    tokens = random_tokens(2, TOKENS)
    got, want = fused_logits(FusedModel.of(model), tokens, (TOKENS,)), model(tokens).logits
    # The two sum in different orders. Where that moves a number across a rounding border, a 4-bit code moves and with
    # it the token's logits; all others agree to fp32.
    assert (error(got, want) < 1e-5).float().mean() > 0.8
    assert error(got, want).max() < 0.2
    assert (got.argmax(-1) == want.argmax(-1)).float().mean() > 0.98


@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_decoding_continue_what_is_cached(name: str) -> None:
    model = tiny_model(name, None, KV8)  # in fp32 nothing but the cache rounds
    tokens = random_tokens(2, TOKENS)
    fused = FusedModel.of(model)
    want = model(tokens).logits
    for chunks in ((TOKENS,), (5, 58, 1, 1, 1, 4)):
        # A moved 8-bit code moves a logit by less than a hundredth.
        assert error(fused_logits(fused, tokens, chunks, len(chunks)), want).max() < 1e-2


def test_a_16_bit_cache_is_in_16_bits() -> None:
    model = tiny_model("llama", None, KVFormat("float"), dtype=torch.bfloat16)
    tokens = random_tokens(2, TOKENS)
    fused = FusedModel.of(model)
    assert fused.format.element == "bf16"
    assert error(fused_logits(fused, tokens, (64, 6)).float(), model(tokens).logits.float()).mean() < 2e-2
    with pytest.raises(UnsupportedError, match="the model is in float32"):
        FusedModel.of(tiny_model("llama", None, KVFormat("float")))


def test_linears_of_a_site_may_be_kept_or_of_several_schemes() -> None:
    model = tiny_model("llama", W4A4, KV8, skip=("self_attn.k_proj", "mlp.gate_proj"))
    fused = FusedModel.of(model)
    tokens = random_tokens(1, 20)
    assert fused.blocks[0].qkv.kernels == ["torch", "reference", "reference"]
    assert (error(fused_logits(fused, tokens, (20,)), model(tokens).logits) < 1e-5).float().mean() > 0.8


@pytest.mark.parametrize("scheme", [SCHEMES["w8a8"], SCHEMES["w4a16"]], ids=["w8a8", "w4a16"])
def test_other_schemes(scheme: Scheme) -> None:
    model = tiny_model("llama", scheme, KV8)
    tokens = random_tokens(1, 20)
    got, want = fused_logits(FusedModel.of(model), tokens, (20,)), model(tokens).logits
    assert (error(got, want) < 1e-4).float().mean() > 0.8


def test_another_activation_than_silu() -> None:
    model = tiny_model("llama", W4A4, KV8, hidden_act="gelu")
    tokens = random_tokens(1, 20)
    got, want = fused_logits(FusedModel.of(model), tokens, (20,)), model(tokens).logits
    assert (error(got, want) < 1e-4).float().mean() > 0.8


def test_centered_keys() -> None:
    model: Any = tiny_model("qwen2", None, KV8)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.kv = replace(attention.kv, centered=True)
        attention.key_center = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    tokens = random_tokens(2, 20)
    fused = FusedModel.of(model)
    assert error(fused_logits(fused, tokens, (12, 1, 7)), model(tokens).logits).max() < 1e-2
    # The center is really taken away: far from the keys, it coarsens their codes.
    for block in fused.blocks:
        block.key_center = block.key_center * 1000  # type: ignore[operator]
    assert error(fused_logits(fused, tokens, (20,)), model(tokens).logits).max() > 0.1


def test_rotations_that_depend_on_the_length_are_refused() -> None:
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model("llama", rope_parameters=parameters)
    with pytest.raises(UnsupportedError, match="'dynamic'"):
        FusedModel.of(model)


def test_weights_are_counted_as_they_are_stored() -> None:
    whole, quantized = (FusedModel.of(tiny_model("llama", scheme, KV8)) for scheme in (None, SCHEMES["w8a8"]))
    linears = sum(projection.parameters for block in whole.blocks for projection in block.projections)
    assert whole.parameters == linears + 97 * 80
    assert whole.read_bytes == 4 * whole.parameters
    row_scales = 4 * sum(sum(projection.sizes) for block in whole.blocks for projection in block.projections)
    assert quantized.read_bytes == linears + row_scales + 4 * 97 * 80
    assert whole.pool_bytes(3) == sum(pool.nbytes for pool in whole.new_pools(3))


def test_a_step_reads_no_page_of_another_sequence() -> None:
    fused = FusedModel.of(tiny_model("mistral", None, KV8))
    tokens = random_tokens(3, TOKENS)
    together = fused_logits(fused, tokens, (TOKENS - 1, 1))
    for row in range(3):
        alone = fused_logits(fused, tokens[row : row + 1], (TOKENS - 1, 1), page_order=row)
        assert error(together[row], alone[0]).max() < 1e-2
