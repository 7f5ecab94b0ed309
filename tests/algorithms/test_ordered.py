"""GPTQ in natural order: groups stay where they are, errors go where there is most left to correct them."""

import pytest
import torch

from atomcli.algorithms.gptq import error_factor, relative_error
from atomcli.algorithms.ordered import descending_energy, gptq_in_order
from atomcli.algorithms.outliers import input_layout
from atomcli.algorithms.rounding import round_to_nearest
from atomcli.formats.scheme import SCHEMES, ActivationFormat, Scheme, WeightFormat

FORMATS = [
    WeightFormat("int4", 32, "fp16"),
    WeightFormat("int4", 128, "fp16"),
    WeightFormat("int8", 64, "fp16"),
    WeightFormat("e2m1", 32, "e8m0"),
    WeightFormat("e2m1", 16, "e4m3"),
]
IDS = [f"{f.element}-{f.scale}-{f.group}" for f in FORMATS]


def scheme_of(format: WeightFormat) -> Scheme:
    return Scheme(format, ActivationFormat("float"))


def problem(rows: int = 24, channels: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs, channels of all energies in no order."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, channels, generator=generator) * 0.05
    mixing = torch.randn(channels, channels, generator=generator) / channels**0.5
    inputs = torch.randn(4 * channels, channels, generator=generator) @ (torch.eye(channels) + mixing)
    inputs = inputs * torch.linspace(0.2, 3, channels)[torch.randperm(channels, generator=generator)]
    return weight, 2 * inputs.t() @ inputs / inputs.shape[0]


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_it_beats_rounding_with_the_very_same_scales(format):
    weight, hessian = problem()
    scheme, importance, order = scheme_of(format), hessian.diagonal(), descending_energy(hessian)
    factor = error_factor(hessian[order][:, order])
    ours = gptq_in_order(weight, factor, order, importance, scheme, "search")
    nearest = round_to_nearest(weight, importance, scheme, "search")
    assert torch.equal(ours.scales(), nearest.scales())
    error = relative_error(weight, ours.dequantize(), hessian)
    assert error < 0.9 * relative_error(weight, nearest.dequantize(), hessian)


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_independent_inputs_leave_nothing_to_correct(format):
    weight, _ = problem()
    scheme, order = scheme_of(format), torch.randperm(300, generator=torch.Generator().manual_seed(1))
    ours = gptq_in_order(weight, torch.eye(300), order, torch.ones(300), scheme, 0.9).tensors()
    nearest = round_to_nearest(weight, torch.ones(300), scheme, 0.9).tensors()
    for name, tensor in nearest.items():
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_the_weight_is_left_alone_and_a_shared_unit_is_used():
    weight, hessian = problem()
    before, scheme, order = weight.clone(), SCHEMES["nvfp4"], descending_energy(hessian)
    unit = torch.tensor([0.01])
    ours = gptq_in_order(weight, torch.eye(300), order, hessian.diagonal(), scheme, 1.0, unit)
    assert torch.equal(weight, before)
    assert torch.equal(ours.unit, unit)
    assert torch.equal(round_to_nearest(weight, hessian.diagonal(), scheme, 1.0, unit).unit, unit)


def test_outliers_have_no_natural_order():
    energy = torch.rand(64)
    assert input_layout(energy, scheme_of(FORMATS[0]), natural=True).permutation is None
    with pytest.raises(ValueError, match="outliers"):
        input_layout(energy, Scheme(FORMATS[0], ActivationFormat("float"), 16), natural=True)
    with pytest.raises(ValueError, match="outlier"):
        gptq_in_order(
            torch.rand(4, 64), torch.eye(64), torch.arange(64), energy,
            Scheme(FORMATS[0], ActivationFormat("float"), 16), 1.0,
        )  # fmt: skip
