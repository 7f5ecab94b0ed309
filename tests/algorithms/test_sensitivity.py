"""The proxy for a scheme's cost: exact for rounding, GPTQ's own loss for GPTQ, and additive on top of a measurement."""

import pytest
import torch

from atomcli.algorithms.gptq import error_factor, gptq, relative_error
from atomcli.algorithms.outliers import input_layout
from atomcli.algorithms.rounding import round_to_nearest
from atomcli.algorithms.sensitivity import Inputs, Sensitivities, Sensitivity, in_layout, output_errors
from atomcli.formats.scheme import scheme_named
from atomcli.kernels.reference import quantized_input


def site(
    loudness: float = 12.0, tokens: int = 400, channels: int = 96, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs (tokens, channels) with a few loud channels, and a weight (64, channels)."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(tokens, 24, generator=generator) @ torch.randn(24, channels, generator=generator) / 24**0.5
    loud = torch.ones(channels).index_fill(0, torch.tensor([3, 50]), loudness)
    x = (common + 0.2 * torch.randn(tokens, channels, generator=generator)) * loud
    return x, torch.randn(64, channels, generator=generator)


def inputs_of(x: torch.Tensor) -> Inputs:
    return Inputs(2 * x.t() @ x / x.shape[0], x, torch.ones(x.shape[0]))


@pytest.mark.parametrize("name", ["w4a16-g32", "w4a4-g32-o8", "w8a8", "w4a8-g16-o0"])
def test_rounding_is_estimated_as_measured(name):
    x, weight = site()
    scheme = scheme_named(name)
    layout = input_layout(x.square().sum(0), scheme)
    (estimate,) = output_errors([weight], inputs_of(x), layout, scheme, 1.0, None)
    transformed = layout.apply(weight)
    importance = in_layout(inputs_of(x).hessian, layout).diagonal()
    y = quantized_input(x, scheme, layout) @ round_to_nearest(transformed, importance, scheme, 1.0).dequantize().t()
    true = float((y - x @ weight.t()).square().sum() / (x @ weight.t()).square().sum())
    assert estimate == pytest.approx(true, rel=0.1)


def test_gptq_is_estimated_from_rounding_alone():
    """The error of columns that later ones correct, over U_ii², comes close to what GPTQ ends with, far from RTN's."""
    x, weight = site(loudness=1.0)
    scheme = scheme_named("w4a16-g32")
    layout = input_layout(x.square().sum(0), scheme)
    hessian = in_layout(inputs_of(x).hessian, layout)
    factor, importance = error_factor(hessian), hessian.diagonal()
    (estimate,) = output_errors([weight], inputs_of(x), layout, scheme, 1.0, factor)
    (rounded,) = output_errors([weight], inputs_of(x), layout, scheme, 1.0, None)
    transformed = layout.apply(weight)
    true = relative_error(transformed, gptq(transformed, factor, importance, scheme, 1.0).dequantize(), hessian)
    assert true < 0.6 * rounded
    assert estimate == pytest.approx(true, rel=0.25)


def test_token_weights_silence_a_token():
    x, weight = site()
    scheme = scheme_named("w4a4-g32-o8")
    layout = input_layout(x.square().sum(0), scheme)
    shouting = x.clone()
    shouting[0] *= 1000
    weights = torch.ones(x.shape[0])
    weights[0] = 0
    (quiet,) = output_errors(
        [weight], Inputs(inputs_of(x).hessian, shouting, weights), layout, scheme, 1.0, error_factor(torch.eye(96))
    )
    (without,) = output_errors(
        [weight], Inputs(inputs_of(x).hessian, x[1:], weights[1:]), layout, scheme, 1.0, error_factor(torch.eye(96))
    )
    assert quiet == pytest.approx(without, rel=1e-4)


def test_losses_follow_errors_and_add_up_to_the_whole():
    groups = (
        Sensitivity("0.qkv", "a", 0.02, {"a": 0.1, "b": 0.05}),
        Sensitivity("0.o", "a", 0.01, {"a": 0.2, "b": 0.0}),
        Sensitivity("0.down", None, 0.0, {}),
    )
    assert [group.loss("b") for group in groups] == pytest.approx([0.01, 0.0, 0.0])
    whole = Sensitivities(groups, cache_kld=0.01, joint_kld=0.06)
    assert whole.interaction == pytest.approx(1.5)
    assert whole.floor + whole.interaction * sum(group.loss("a") for group in groups) == pytest.approx(0.06)
