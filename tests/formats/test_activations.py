import pytest
import torch

from atomcli.errors import UsageError
from atomcli.formats.activations import quantize_activations
from atomcli.formats.scheme import ActivationFormat, Scheme, WeightFormat

FORMATS = {
    "int8 per token": ActivationFormat("int8"),
    "int4 per token": ActivationFormat("int4"),
    "int4 fp16": ActivationFormat("int4", 128, "fp16"),
    "int4 two-level": ActivationFormat("int4", 128, "two_level"),
    "int4 two-level asymmetric": ActivationFormat("int4", 128, "two_level", symmetric=False),
    "e2m1 fp16": ActivationFormat("e2m1", 128, "fp16"),
    "mxfp4": ActivationFormat("e2m1", 32, "e8m0"),
    "nvfp4": ActivationFormat("e2m1", 16, "e4m3"),
    "nvfp4 adaptive": ActivationFormat("e2m1", 16, "e4m3", adaptive=True),
}
# Relative error on Gaussian data: what each format should at least reach, from its step size.
WORST = dict(zip(FORMATS, [0.012, 0.16, 0.125, 0.125, 0.105, 0.12, 0.13, 0.1, 0.09], strict=True))


def _scheme(format: ActivationFormat, outliers: int = 0) -> Scheme:
    return Scheme(WeightFormat("int4", 128, "fp16"), format, outliers)


def _inputs(channels: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(channels)
    return torch.randn(37, channels, generator=generator) * 10 ** torch.randn(37, 1, generator=generator)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("channels", [1024, 448])
def test_error_stays_within_the_format(name: str, channels: int) -> None:
    x = _inputs(channels)
    error = quantize_activations(x, _scheme(FORMATS[name])).dequantize() - x
    assert (error.norm(dim=1) / x.norm(dim=1)).mean() < WORST[name]


def test_adaptive_groups_end_at_six_or_four_whichever_is_nearer() -> None:
    x = _inputs(1024)
    plain, adaptive = (quantize_activations(x, _scheme(FORMATS[name])) for name in ("nvfp4", "nvfp4 adaptive"))
    groups = x.view(37, 64, 16)
    ends = (groups.abs().amax(dim=-1) / adaptive.scales()).view(-1)
    assert (((ends - 6).abs() < 0.4) | ((ends - 4).abs() < 0.27)).all()  # E4M3 has three bits of mantissa
    assert 0.2 < ((ends - 4).abs() < 0.27).float().mean() < 0.8
    errors = [(each.dequantize() - x).view_as(groups).square().sum(dim=-1) for each in (plain, adaptive)]
    assert errors[1].sum() < 0.9 * errors[0].sum()
    # A group at the end of the range of its scale: 4 tells 3 and 4 apart from the 4.5 and 6 that 6 offers.
    row = torch.zeros(1, 1024)
    row[0, :4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert torch.equal(quantize_activations(row, _scheme(FORMATS["nvfp4 adaptive"])).dequantize(), row)


def test_only_nvfp4_is_adaptive() -> None:
    with pytest.raises(UsageError, match="Adaptive activations need the e4m3 scales of nvfp4, not e8m0"):
        ActivationFormat("e2m1", 32, "e8m0", adaptive=True)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zero_and_finite(name: str) -> None:
    x = torch.zeros(3, 448)
    x[1, 5] = 1e-20
    x[2, 200] = 3.0
    restored = quantize_activations(x, _scheme(FORMATS[name], 64)).dequantize()
    assert torch.equal(restored[0], x[0])
    assert restored.isfinite().all()
    assert (restored[2, :128] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_two_level_operands_are_exact_int8(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(400, 448, generator=generator).exp() * torch.randn(400, 1, generator=generator).sign()
    x[::3] = torch.randn(134, 448, generator=generator) * 20 - 15
    x[::5, ::2] *= -1
    quantized = quantize_activations(x, _scheme(ActivationFormat("int4", 128, "two_level", symmetric)))
    wide = quantized.codes.int() * quantized.multipliers.repeat_interleave(128, 1)[:, :448].int()
    if quantized.offsets is not None:
        wide = wide + quantized.offsets.repeat_interleave(128, 1)[:, :448].int()
    assert torch.equal(wide, quantized.integers().int())
    low, high = (-8, 7) if symmetric else (0, 15)
    assert quantized.codes.amin() >= low
    assert quantized.codes.amax() <= high


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    x = _inputs(448)
    for format in FORMATS.values():
        scheme = _scheme(format, 64)
        together, alone = (
            quantize_activations(x, scheme).dequantize(),
            quantize_activations(x[4:5], scheme).dequantize(),
        )
        assert torch.equal(together[4:5], alone)


def test_clip_narrows_the_body_but_not_the_outliers() -> None:
    x = torch.full((1, 256), 0.1)
    x[0, 0], x[0, -1] = 10.0, 10.0
    scheme = _scheme(ActivationFormat("int4", 128, "fp16", clip=0.5), outliers=128)
    restored = quantize_activations(x, scheme).dequantize()
    assert restored[0, 0] == pytest.approx(5.0, rel=1e-3)
    assert restored[0, -1] == pytest.approx(10.0, rel=1e-3)


def test_scales_are_rounded_before_codes_are_taken() -> None:
    x = _inputs(128)
    quantized = quantize_activations(x, _scheme(FORMATS["int4 fp16"]))
    assert quantized.group_scales is not None
    assert quantized.group_scales.dtype == torch.float16
    nearest = (x / quantized.group_scales.float()).round().clamp(-8, 7)
    assert (nearest - quantized.codes).abs().max() <= 1  # the reciprocal may move an exact tie
    assert (nearest != quantized.codes).float().mean() < 1e-3


def test_clipped_int4_uses_all_sixteen_codes() -> None:
    x = torch.linspace(-1, 1, 128)[None]
    codes = quantize_activations(x, _scheme(ActivationFormat("int4", 128, "fp16", clip=0.85))).codes
    assert (codes.amin(), codes.amax()) == (-8, 7)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("outliers", [0, 64])
def test_bits_per_activation_are_those_of_the_tensors(name: str, outliers: int) -> None:
    scheme = _scheme(FORMATS[name], outliers)
    quantized = quantize_activations(_inputs(448), scheme)
    bits = {"codes": scheme.activations.grid.bits * quantized.codes.numel()}
    for part in ("token_scale", "group_scales", "multipliers", "offsets", "outlier_codes", "outlier_scale"):
        tensor = getattr(quantized, part)
        bits[part] = 0 if tensor is None else 8 * tensor.nbytes
    assert scheme.bits_per_activation(448) == pytest.approx(sum(bits.values()) / (37 * 448))
