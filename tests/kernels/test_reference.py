import pytest
import torch

from atomcli.formats.activations import quantize_activations
from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import ActivationFormat, Scheme, WeightFormat
from atomcli.kernels import reference
from tests.formats.test_weights import random_weight

COLUMNS = 448 + 128
TWO_LEVEL, PER_GROUP = WeightFormat("int4", 128, "two_level"), WeightFormat("int4", 128, "fp16")
INTEGER_SCHEMES = {
    "w4a8": Scheme(TWO_LEVEL, ActivationFormat("int8"), 128, "hadamard"),
    "w4a4": Scheme(TWO_LEVEL, ActivationFormat("int4", 128, "two_level", symmetric=False), 64),
    "w8a8": Scheme(WeightFormat("int8"), ActivationFormat("int8")),
    "paper": Scheme(PER_GROUP, ActivationFormat("int4", 128, "fp16", clip=0.9), 128),
}


@pytest.mark.parametrize("name", INTEGER_SCHEMES)
def test_integer_sums_and_dequantized_product_are_one_contract(name: str) -> None:
    scheme = INTEGER_SCHEMES[name]
    weight = random_weight(scheme, columns=COLUMNS)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(13, COLUMNS, generator=generator)
    bias = torch.randn(weight.shape[0], generator=generator)
    permutation = torch.randperm(COLUMNS, generator=generator)
    layout = InputLayout(COLUMNS, scheme.outliers, 128, permutation, hadamard=scheme.transform == "hadamard")

    activations = quantize_activations(layout.apply(x), scheme)
    sums = reference.integer_sums(activations, weight)
    from_integers = reference.linear_from_integers(sums, activations, weight, bias)
    direct = reference.linear(x, weight, layout, bias)

    assert (direct - from_integers).norm() / direct.norm() < 1e-5
    wide = activations.integers().long() @ weight.integers().long().T
    assert torch.equal(sums.body.sum(dim=-1), wide)


def test_output_keeps_dtype_and_leading_shape() -> None:
    weight = random_weight(INTEGER_SCHEMES["w4a8"], columns=COLUMNS)
    layout = InputLayout(COLUMNS, 128)
    x = torch.randn(2, 3, COLUMNS, dtype=torch.bfloat16)
    y = reference.linear(x, weight, layout, dequantized=weight.dequantize())
    assert y.shape == (2, 3, weight.shape[0])
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, reference.linear(x, weight, layout))
