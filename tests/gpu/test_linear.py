"""A quantized layer on its kernel gives what the reference gives, for every named scheme that has one."""

import pytest
import torch

from atomcli.formats.scheme import SCHEMES, Scheme
from atomcli.formats.weights import QuantizedWeight, tensor_layout
from atomcli.kernels import dispatch
from atomcli.runtime.linear import QuantLinear, gpu_kernel, input_layout, pick_kernel, reference_kernel, share_inputs
from tests.kernels.gemm_cases import random_group_weight, relative_error

pytestmark = pytest.mark.gpu


def random_weight(scheme: Scheme, rows: int, channels: int) -> QuantizedWeight:
    """Random codes and scales of any quantized scheme."""
    if scheme.weights.scale not in ("two_level", "row"):
        return random_group_weight(scheme, rows, channels, "cuda")
    body = scheme.body(channels)
    low, high = (-8, 8) if scheme.weights.grid.bits == 4 else (-127, 128)
    codes = torch.randint(low, high, (rows, body), device="cuda", dtype=torch.int8)
    multipliers = None
    if scheme.weights.scale == "two_level":
        multipliers = torch.randint(-15, 16, (rows, -(-body // 128)), device="cuda", dtype=torch.int8)
    unit = torch.rand(rows, device="cuda") * 1e-3
    if not scheme.outliers:
        return QuantizedWeight.from_codes(scheme, codes, multipliers, unit)
    outliers = torch.randint(-127, 128, (rows, scheme.outliers), device="cuda", dtype=torch.int8)
    return QuantizedWeight.from_codes(
        scheme, codes, multipliers, unit, outliers, torch.rand(rows, device="cuda") * 1e-3
    )


def random_linear(scheme: Scheme, rows: int, channels: int) -> QuantLinear:
    weight = random_weight(scheme, rows, channels)
    permutation = torch.randperm(channels, device="cuda")
    bias = torch.randn(rows, device="cuda", dtype=torch.bfloat16)
    return QuantLinear.from_weight(weight, input_layout(scheme, channels, permutation), bias)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("tokens", [1, 19, 300])
def test_kernel_equals_reference(name: str, tokens: int) -> None:
    if dispatch.choose(SCHEMES[name], "cuda").kernel is None:
        pytest.skip(dispatch.choose(SCHEMES[name], "cuda").reason or "")
    linear = random_linear(SCHEMES[name], 320, 704)
    x = torch.randn(2, tokens, 704, device="cuda", dtype=torch.bfloat16)
    assert pick_kernel(linear, x) is gpu_kernel
    for add_bias in (True, False):
        y = linear(x, add_bias=add_bias)
        assert y.shape == (2, tokens, 320)
        assert y.dtype == x.dtype
        assert relative_error(y, reference_kernel(linear, x.float(), add_bias)) <= 2e-3


def test_observed_and_fp32_layers_run_on_the_reference() -> None:
    linear = random_linear(SCHEMES["w4a8"], 128, 512)
    assert pick_kernel(linear, torch.randn(1, 512, device="cuda")) is reference_kernel
    linear.observer = lambda tokens: None
    assert pick_kernel(linear, torch.randn(1, 512, device="cuda", dtype=torch.bfloat16)) is reference_kernel


def test_readers_of_one_input_quantize_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (random_linear(SCHEMES["w4a8"], 128, 512) for _ in range(2))
    second.permutation = first.permutation
    share_inputs([first, second])
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    alone = [reference_kernel(linear, x.clone(), True) for linear in (first, second)]
    calls = []
    quantize = dispatch.Product.quantize
    monkeypatch.setattr(dispatch.Product, "quantize", lambda self, x: calls.append(1) or quantize(self, x))
    together = [linear(x) for linear in (first, second)]
    assert len(calls) == 1
    assert all(relative_error(a, b) <= 4e-3 for a, b in zip(together, alone, strict=True))


def test_a_moved_or_reloaded_layer_is_repacked() -> None:
    linear, other = (random_linear(SCHEMES["w4a8"], 128, 512) for _ in range(2))
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    before = linear(x)
    linear.load_state_dict(other.state_dict())
    assert not torch.equal(linear(x), before)
    assert torch.equal(linear(x), other(x))


@pytest.mark.parametrize("name", ["w4a8", "atom-paper", "nvfp4"])
def test_only_the_repacked_weight_stays_on_the_card(name: str) -> None:
    linear = random_linear(SCHEMES[name], 128, 512)
    before = {key: tensor.clone() for key, tensor in linear.state_dict().items()}
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    y = linear(x)
    specs = tensor_layout(linear.scheme, 128, 512)
    assert all(getattr(linear, spec.suffix).device.type == "cpu" for spec in specs)
    assert linear.device == x.device
    after = linear.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].cpu(), after[key].cpu()) for key in before)
    assert relative_error(y, reference_kernel(linear, x.float(), True)) <= 2e-3
    linear.load_state_dict(before)
    assert torch.equal(linear(x), y)
    assert torch.equal(linear.to("cuda")(x), y)
    assert linear.to("cpu").device.type == "cpu"
