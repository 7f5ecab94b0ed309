"""GPTQ and round-to-nearest: properties that hold for every weight format."""

import pytest
import torch

from atomcli.algorithms.gptq import error_factor, gptq, relative_error
from atomcli.algorithms.rounding import round_to_nearest, unrounded
from atomcli.errors import RunError
from atomcli.formats import grids
from atomcli.formats.groups import expand
from atomcli.formats.scheme import ActivationFormat, Scheme, WeightFormat

FORMATS = [
    WeightFormat("int4", 32, "fp16"),
    WeightFormat("int4", 128, "fp16"),
    WeightFormat("int4", 32, "two_level"),
    WeightFormat("int8", None, "row"),
    WeightFormat("int8", 64, "fp16"),
    WeightFormat("e2m1", 32, "fp16"),
    WeightFormat("e2m1", 32, "e8m0"),
    WeightFormat("e2m1", 16, "e4m3"),
    WeightFormat("int4", 256, "fp16"),
]
IDS = [f"{f.element}-{f.scale}-{f.group}" for f in FORMATS]


def scheme_of(format: WeightFormat, outliers: int = 0) -> Scheme:
    return Scheme(format, ActivationFormat("float"), outliers)


def problem(rows: int, channels: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs, channels by ascending energy."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, channels, generator=generator) * 0.05
    mixing = torch.randn(channels, channels, generator=generator) / channels**0.5
    inputs = torch.randn(4 * channels, channels, generator=generator) @ (torch.eye(channels) + mixing)
    inputs = inputs * torch.linspace(0.2, 3, channels)
    return weight, 2 * inputs.t() @ inputs / inputs.shape[0]


@pytest.mark.parametrize("clip", [0.9, "search"])
@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_gptq_beats_rounding_to_nearest(format, clip):
    weight, hessian = problem(24, 300)  # 300 - 20 outliers = 280: ragged for every group
    scheme, importance = scheme_of(format, 20), hessian.diagonal()
    ours = gptq(weight, error_factor(hessian), importance, scheme, clip)
    nearest = round_to_nearest(weight, importance, scheme, clip)
    assert relative_error(weight, ours.dequantize(), hessian) < 0.9 * relative_error(
        weight, nearest.dequantize(), hessian
    )


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_gptq_is_rounding_to_nearest_for_independent_inputs(format):
    weight, _ = problem(16, 200)
    scheme, importance = scheme_of(format, 8), torch.ones(200)
    ours = gptq(weight, error_factor(torch.eye(200)), importance, scheme, "search").tensors()
    nearest = round_to_nearest(weight, importance, scheme, "search").tensors()
    assert ours.keys() == nearest.keys()
    for name in ours:
        assert ours[name].dtype == nearest[name].dtype
        assert torch.equal(ours[name].view(torch.uint8), nearest[name].view(torch.uint8)), name


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_weights_on_the_grid_come_back_exactly(method):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-7, 8, (8, 96), generator=generator)
    codes[:, ::32] = 7  # every group reaches the end of the grid
    scale = torch.rand(8, 3, generator=generator).half().float()
    weight = codes * expand(scale, 96, 32)
    _, hessian = problem(8, 96)
    scheme = scheme_of(WeightFormat("int4", 32, "fp16"))
    if method == "gptq":
        quantized = gptq(weight, error_factor(hessian), hessian.diagonal(), scheme, 1.0)
    else:
        quantized = round_to_nearest(weight, hessian.diagonal(), scheme, 1.0)
    assert torch.equal(quantized.body_codes(), codes.to(torch.int8))
    assert torch.allclose(quantized.dequantize(), weight, rtol=2e-3, atol=0)


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_an_all_zero_group_stays_zero(format):
    weight, hessian = problem(8, 288)
    weight[:, :256] = 0
    weight[3] = 0
    for clip in (0.85, "search"):
        quantized = round_to_nearest(weight, hessian.diagonal(), scheme_of(format, 16), clip)
        assert not quantized.dequantize()[:, :256].any()
        assert not quantized.dequantize()[3].any()
        ours = gptq(weight, error_factor(hessian), hessian.diagonal(), scheme_of(format, 16), clip).dequantize()
        assert torch.isfinite(ours).all()
        assert not ours[:, :256].any()
        assert not ours[3].any()


def test_scales_are_those_of_the_paper_for_a_fixed_clip():
    weight, _ = problem(4, 64)
    quantized = round_to_nearest(weight, torch.ones(64), scheme_of(WeightFormat("int4", 32, "fp16")), 0.85)
    expected = (weight.unflatten(1, (2, 32)).abs().amax(-1) * 0.85 / 7).half()
    assert torch.equal(quantized.group_scales, expected)
    ratio = weight / expand(expected.float(), 64, 32)
    assert (quantized.body_codes().float() - ratio.clamp(-7, 7)).abs().max() <= 0.5 + 1e-3


def test_the_searched_clip_never_loses_to_a_fixed_one():
    weight, hessian = problem(16, 256)
    weight[:, 5] *= 12  # one column that a good clip cuts off
    importance = hessian.diagonal()
    for format in FORMATS:

        def error(clip, format=format):
            difference = round_to_nearest(weight, importance, scheme_of(format), clip).dequantize() - weight
            return float((difference.square() * importance).sum())

        assert error("search") <= error(1.0) * 1.0001, format


def test_two_level_uses_the_code_minus_eight_and_stays_int8():
    weight, hessian = problem(16, 256)
    quantized = round_to_nearest(
        weight, hessian.diagonal(), scheme_of(WeightFormat("int4", 128, "two_level")), "search"
    )
    assert quantized.body_codes().min() == -8
    assert quantized.group_scales.abs().max() <= 15
    assert (quantized.group_scales != 0).all()
    exact = quantized.body_codes().int() * expand(quantized.group_scales.int(), 256, 128)
    assert torch.equal(exact, quantized.integers().int())


def test_outliers_absorb_the_error_of_the_body():
    weight, hessian = problem(16, 128)
    scheme = scheme_of(WeightFormat("int4", 32, "fp16"), 32)
    quantized = gptq(weight, error_factor(hessian), hessian.diagonal(), scheme, 0.85)
    outliers = quantized.dequantize()[:, 96:]
    step = quantized.outlier_scale[:, None]
    assert ((outliers - weight[:, 96:]).abs() > step).any(), "they moved by more than their own rounding"
    assert (quantized.outlier_codes.abs().amax(dim=1) == 127).all()


def test_group_borders_do_not_depend_on_the_panel():
    """A group of 256 spans two panels of 128 columns; the plain algorithm, one column at a time, must agree."""
    weight, hessian = problem(6, 300)
    scheme = scheme_of(WeightFormat("int4", 256, "fp16"))
    factor = error_factor(hessian)
    ours = gptq(weight, factor, hessian.diagonal(), scheme, 0.9)
    work, codes = weight.double().clone(), []
    for column in range(300):
        if column % 256 == 0:
            absmax = work[:, column : column + 256].abs().amax(1).float() * 0.9
            scale = (absmax / 7).half().float()
        code = grids.encode(work[:, column].float() * grids.reciprocal(scale), grids.INT4)
        codes.append(code)
        error = (work[:, column] - code * scale) / factor[column, column]
        work[:, column:] -= error[:, None] * factor[column, column:].double()
    different = (ours.body_codes() != torch.stack(codes, 1)).float().mean()
    assert different < 0.01, "only ties may fall differently in fp32"


def test_damping_grows_until_a_singular_hessian_decomposes():
    inputs = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))  # rank 5 of 64
    hessian = inputs.t() @ inputs
    hessian -= 0.5 * torch.eye(64) * hessian.diagonal().mean()  # and indefinite
    factor = error_factor(hessian)
    assert torch.isfinite(factor).all()
    assert (factor.diagonal() > 0).all()


def test_no_tokens_means_no_compensation():
    assert torch.equal(error_factor(torch.zeros(8, 8)), torch.eye(8))


def test_a_hessian_that_is_not_finite_is_refused():
    with pytest.raises(RunError, match="not finite"):
        error_factor(torch.full((4, 4), float("nan")))


def test_weights_kept_in_16_bits_pass_through():
    weight, _ = problem(4, 32)
    quantized = unrounded(weight, Scheme(WeightFormat("float"), ActivationFormat("int8"), 8), torch.bfloat16)
    assert torch.equal(quantized.dequantize(), weight.bfloat16().float())
