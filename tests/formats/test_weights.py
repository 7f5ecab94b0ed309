import pytest
import torch

from atomcli.errors import InputError, UsageError
from atomcli.formats import grids, scales
from atomcli.formats.groups import expand, split
from atomcli.formats.kv import dequantize_kv, quantize_kv
from atomcli.formats.scheme import SCHEMES, ActivationFormat, KVFormat, Scheme, WeightFormat
from atomcli.formats.weights import QuantizedWeight, tensor_layout

ROWS, COLUMNS = 24, 448 + 128


def random_weight(scheme: Scheme, rows: int = ROWS, columns: int = COLUMNS) -> QuantizedWeight:
    """A weight of random codes and scales, every code of the grid among them."""
    generator = torch.Generator().manual_seed(1)
    body = scheme.body(columns)
    fields = {}
    for spec in tensor_layout(scheme, rows, columns):
        if spec.dtype.is_floating_point:
            tensor = torch.rand(spec.shape, generator=generator).add(0.01).to(spec.dtype)
        elif spec.suffix == "weight_multiplier":
            tensor = torch.randint(-15, 16, spec.shape, generator=generator).to(spec.dtype)
        elif spec.suffix == "weight_exponent":
            tensor = torch.randint(120, 135, spec.shape, generator=generator).to(spec.dtype)
        elif spec.dtype == torch.int8:
            tensor = torch.randint(-127, 128, spec.shape, generator=generator).to(spec.dtype)
        else:
            tensor = torch.randint(0, 256, spec.shape, generator=generator).to(spec.dtype)
            if body % 2:
                tensor[:, -1] &= 0xF
        fields[spec.field] = tensor
    return QuantizedWeight(scheme, (rows, columns), **fields)


@pytest.mark.parametrize("name", SCHEMES)
def test_tensors_round_trip_and_weigh_what_the_scheme_says(name: str) -> None:
    scheme = SCHEMES[name]
    weight = random_weight(scheme)
    tensors = weight.tensors()
    again = QuantizedWeight.from_tensors(scheme, weight.shape, tensors)
    assert torch.equal(again.dequantize(), weight.dequantize())
    stored = 8 * sum(tensor.nbytes for tensor in tensors.values()) / (ROWS * COLUMNS)
    assert stored == pytest.approx(scheme.bits_per_weight(COLUMNS, ROWS), rel=1e-9)


@pytest.mark.parametrize("name", ["w4a4", "w8a8"])
def test_the_integer_operand_is_the_weight_in_units_of_its_row_scale(name: str) -> None:
    weight = random_weight(SCHEMES[name])
    body = weight.integers().float() * weight.unit[:, None]
    assert torch.allclose(body, weight.dequantize()[:, : weight.body], rtol=1e-6)


def test_missing_and_misshapen_tensors_are_named() -> None:
    weight = random_weight(SCHEMES["w4a4"])
    tensors = weight.tensors()
    scale = tensors.pop("weight_multiplier")
    with pytest.raises(InputError, match="lacks weight_multiplier"):
        QuantizedWeight.from_tensors(weight.scheme, weight.shape, tensors)
    with pytest.raises(InputError, match=r"weight_multiplier is torch\.int8"):
        QuantizedWeight.from_tensors(weight.scheme, weight.shape, {**tensors, "weight_multiplier": scale[:-1]})


def test_multipliers_keep_sign_and_never_lose_a_group() -> None:
    ideal = torch.tensor([[0.15, -0.15, 1e-6, -1e-6, 0.0, 0.074]])
    assert scales.multipliers(ideal, torch.tensor([[0.01]])).tolist() == [[15, -15, 1, -1, 0, 7]]


def test_e8m0_scales_never_cut_off_more_than_a_seventh() -> None:
    absmax = torch.tensor([6.0, 4.0, 6.99, 7.0, 8.0, 3.0, 0.0, 1e-38])
    values = scales.e8m0_values(scales.e8m0_exponents(absmax))
    assert values.tolist()[:6] == [1.0, 1.0, 1.0, 2.0, 2.0, 0.5]
    ordinary = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 1e3 + 1e-3
    units = ordinary / scales.e8m0_values(scales.e8m0_exponents(ordinary))
    assert (units.min() >= 3.5) & (units.max() < 7)
    assert values.isfinite().all()


def test_nvfp4_scales_are_stored_in_units_of_the_tensor_scale() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    format = WeightFormat("e2m1", 16, "e4m3")
    absmax = split(x, 16).abs().amax(dim=-1)
    unit = scales.e4m3_unit(absmax.amax()).reshape(1)
    stored = scales.group_scales(absmax, format, unit)
    scale = scales.effective(stored, format, unit)
    codes = grids.encode(x * expand(grids.reciprocal(scale), 64, 16), grids.E2M1)
    error = grids.decode(codes, grids.E2M1) * expand(scale, 64, 16) - x
    assert error.norm() / x.norm() < 0.11


def test_impossible_formats_are_refused() -> None:
    with pytest.raises(UsageError, match="Group 100"):
        WeightFormat("int4", 100, "fp16")
    with pytest.raises(UsageError, match="No format stores int8"):
        WeightFormat("int8", 128, "two_level")
    with pytest.raises(UsageError, match="leave no body"):
        SCHEMES["w4a4"].body(128)
    with pytest.raises(UsageError, match="clip ratio"):
        ActivationFormat("int8", clip=1.5)
    with pytest.raises(UsageError, match="after RoPE"):
        KVFormat("int4", "before_rope", hadamard=True)


def test_schemes_survive_json() -> None:
    for scheme in SCHEMES.values():
        assert Scheme.from_dict(scheme.to_dict()) == scheme


@pytest.mark.parametrize(
    "change",
    [{"outliers": "many"}, {"transform": "fourier"}, {"weights": 4}, {"weights": {"element": "int3"}}, {"a": 1}],
)
def test_a_damaged_scheme_is_a_wrong_file_not_a_wrong_command(change):
    with pytest.raises(InputError, match="A saved scheme is not one"):
        Scheme.from_dict(SCHEMES["w4a4"].to_dict() | change)


def test_a_cache_format_that_nothing_implements_is_refused():
    with pytest.raises(UsageError, match="not int3 after_rope"):
        KVFormat("int3")


@pytest.mark.parametrize("element", ["int4", "int8"])
def test_cached_vectors_come_back_within_half_a_step(element: str) -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * 4 + 1
    x[0, 0] = 0.0
    codes, scale, minimum = quantize_kv(x, element)
    assert codes.nbytes == x.numel() * (0.5 if element == "int4" else 1)
    restored = dequantize_kv(codes, scale, minimum, element)
    assert torch.equal(restored[0, 0], x[0, 0])
    step = scale.float()[..., None]
    assert ((restored - x).abs() <= step * 0.5 + 4e-3 * x.abs().amax()).all()
