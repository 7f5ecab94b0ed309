"""Quantized linears: the product of the oracle, one quantization per site, tensors that survive a round trip."""

from typing import Any

import pytest
import torch
from torch import nn

from atomcli.algorithms.rounding import round_to_nearest
from atomcli.errors import UsageError
from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import SCHEMES, ActivationFormat, Scheme, WeightFormat
from atomcli.kernels import reference
from atomcli.runtime.linear import QuantLinear, input_layout, keep_dequantized_weights, permutation_dtype, share_inputs
from tests.helpers.tiny import random_layout_tensors

SCHEME = Scheme(WeightFormat("int4", 32, "two_level"), ActivationFormat("int8"), 16, "hadamard")


def random_linear(scheme: Scheme = SCHEME, bias: bool = True, layout_seed: int = 0, seed: int = 0) -> QuantLinear:
    generator = torch.Generator().manual_seed(seed)
    permutation, signs = random_layout_tensors(scheme, 80, layout_seed)
    layout = input_layout(scheme, 80, permutation, signs)
    weight = layout.apply(torch.randn(48, 80, generator=generator))
    quantized = round_to_nearest(weight, torch.ones(80), scheme, 1.0)
    return QuantLinear.from_weight(quantized, layout, torch.randn(48, generator=generator) if bias else None)


@pytest.mark.parametrize("name", ["w4a4", "w4a16", "w8a8", "atom-paper", "mxfp4", "nvfp4"])
def test_product_is_the_oracles(name: str) -> None:
    shipped = SCHEMES[name]
    scheme = Scheme(shipped.weights, shipped.activations, min(shipped.outliers, 16), shipped.transform)
    linear = random_linear(scheme)
    x = torch.randn(2, 5, 80, generator=torch.Generator().manual_seed(9), dtype=torch.float32).bfloat16()
    expected = reference.linear(x, linear.weight_tensors, linear.layout, linear.bias)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(linear(x), expected)
    without = reference.linear(x, linear.weight_tensors, linear.layout)
    assert torch.equal(linear(x, add_bias=False), without)
    assert not torch.equal(without, expected)


def test_tensors_survive_a_round_trip() -> None:
    linear = random_linear()
    again = QuantLinear.from_entry(linear.entry("x"), {"x": SCHEME}, torch.float32, None)
    again.load_state_dict(linear.state_dict(), strict=True)
    assert {name: tensor.dtype for name, tensor in again.state_dict().items()} == {
        name: tensor.dtype for name, tensor in linear.state_dict().items()
    }
    assert again.permutation.dtype == torch.int16
    x = torch.randn(3, 80)
    assert torch.equal(linear(x), again(x))


def test_entry_names_what_is_there() -> None:
    assert random_linear().entry() == {
        "scheme": SCHEME.name,
        "in_features": 80,
        "out_features": 48,
        "bias": True,
        "permutation": True,
        "signs": True,
    }
    plain = QuantLinear(80, 48, SCHEMES["w8a8"], permutation=False)
    assert plain.entry("w8a8", 0.9) == {
        "scheme": "w8a8",
        "in_features": 80,
        "out_features": 48,
        "activation_clip": 0.9,
    }
    clipped = QuantLinear.from_entry(plain.entry("w8a8", 0.9), {"w8a8": SCHEMES["w8a8"]}, torch.float32, "meta")
    assert clipped.scheme.activations.clip == 0.9
    assert clipped.permutation is None
    assert [permutation_dtype(size) for size in (2**15 - 1, 2**15)] == [torch.int16, torch.int32]


def test_observer_sees_what_the_product_sees() -> None:
    linear = random_linear(bias=False)
    seen: list[torch.Tensor] = []
    linear.observer = seen.append
    x = torch.randn(2, 3, 80)
    y = linear(x)
    assert seen[0].shape == (6, 80)
    assert torch.equal(seen[0] @ linear.dequantized().T, y.view(6, 48))
    assert torch.equal(seen[0], reference.quantized_input(x.view(6, 80), linear.scheme, linear.layout))


def test_a_site_quantizes_its_input_once(monkeypatch: Any) -> None:
    calls = []
    original = reference.quantized_input
    monkeypatch.setattr(reference, "quantized_input", lambda *a: calls.append(1) or original(*a))
    same = [random_linear(seed=seed) for seed in range(3)]
    other = random_linear(layout_seed=1)
    expected = [linear(torch.ones(1, 80)) for linear in [*same, other]]
    share_inputs([*same, other])
    assert same[0].shared_input is same[2].shared_input
    assert other.shared_input is not same[0].shared_input
    for _ in range(2):
        calls.clear()
        x = torch.ones(1, 80)
        assert all(torch.equal(linear(x), y) for linear, y in zip([*same, other], expected, strict=True))
        assert len(calls) == 2
        assert same[0].shared_input._source is None
    first = same[0](torch.ones(1, 80))
    assert not torch.equal(first, same[0](torch.zeros(1, 80)))


def test_unpacked_weights_are_kept_only_within_the_limit() -> None:
    model = nn.ModuleList([random_linear(), random_linear()])
    needed = 2 * 4 * 80 * 48
    x = torch.randn(2, 80)
    before = model[0](x)
    assert not keep_dequantized_weights(model, needed - 1)
    assert model[0]._dequantized is None
    assert keep_dequantized_weights(model, needed)
    assert torch.equal(model[0](x), before)
    assert torch.equal(model[0](x), before)
    assert model[0]._dequantized is not None
    assert set(model.state_dict()) == {f"{i}.{name}" for i in (0, 1) for name in model[0].state_dict()}


def test_a_layout_of_another_scheme_is_refused() -> None:
    linear = random_linear()
    with pytest.raises(UsageError, match="is not that of scheme"):
        QuantLinear.from_weight(linear.weight_tensors, InputLayout(80, 16, 64, hadamard=True))
    with pytest.raises(UsageError, match="is not that of scheme"):
        QuantLinear.from_weight(linear.weight_tensors, InputLayout(80, 8, 128, hadamard=True))


@pytest.mark.parametrize("name", ["w4a4", "nvfp4", "atom-paper"])
def test_casting_the_model_leaves_the_format_alone(name: str) -> None:
    shipped = SCHEMES[name]
    linear = random_linear(Scheme(shipped.weights, shipped.activations, 16, shipped.transform))
    before = {key: tensor.clone() for key, tensor in linear.state_dict().items()}
    nn.Sequential(linear).half().to(torch.bfloat16)
    after = linear.state_dict()
    assert after["bias"].dtype == torch.bfloat16
    for key in before.keys() - {"bias"}:
        assert after[key].dtype == before[key].dtype
        assert torch.equal(after[key].view(torch.uint8), before[key].view(torch.uint8))
