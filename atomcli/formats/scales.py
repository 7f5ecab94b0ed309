"""Scales: from a group's range to the scale that is stored, and from the stored scale to the one that is used.

What is stored is rounded first and only then used to compute codes, so what is optimised is what is served.
"""

import torch
from torch import Tensor

from atomcli.formats import grids
from atomcli.formats.scheme import WeightFormat

MAX_MULTIPLIER = 15
_E4M3_MAX = 448.0
# The largest scale of adaptive groups that map their largest value to 6: it, and 1.5 times it, are E4M3 numbers.
_ADAPTIVE_MAX = 256.0
_E2M1_MAX = 6.0
_E8M0_BIAS = 127


def group_scales(absmax: Tensor, format: WeightFormat, tensor_scale: Tensor | None = None) -> Tensor:
    """Stored group scales (..., G) of groups whose clipped absolute maximum is `absmax` (..., G) fp32.

    fp16: absmax / grid maximum. e8m0: see `e8m0_exponents`.
    e4m3: absmax / 6 in units of `tensor_scale`. Two-level scales need a row scale: see `multipliers`.
    """
    if format.scale == "fp16":
        return (absmax / format.grid.high).half()
    if format.scale == "e8m0":
        return e8m0_exponents(absmax)
    if format.scale == "e4m3":
        assert tensor_scale is not None, "e4m3 scales are stored in units of a tensor scale"
        return e4m3_scales(absmax, tensor_scale)
    raise ValueError(f"{format.scale} scales are not one per group")


def e8m0_exponents(absmax: Tensor) -> Tensor:
    """Biased power-of-two exponents (uint8) for E2M1 groups; an all-zero group gets the smallest.

    The largest value lands in 3.5 ... 7, where E2M1 ends at 6. The OCP rule, floor(log2 absmax) - 2, lets it reach 8
    and cuts off up to a quarter of it; going to the next power from a mantissa of 1.75 on, as compressed-tensors does,
    costs the group less.
    """
    mantissa, exponent = torch.frexp(absmax)  # absmax = mantissa * 2^exponent with mantissa in [0.5, 1)
    biased = exponent - 1 - 2 + _E8M0_BIAS + (mantissa >= 0.875).to(exponent.dtype)
    return torch.where(absmax > 0, biased, 0).clamp(0, 254).to(torch.uint8)


def e8m0_values(exponents: Tensor) -> Tensor:
    """Scales (fp32) of biased exponents."""
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - _E8M0_BIAS)


def e4m3_unit(absmax: Tensor, *, adaptive: bool = False) -> Tensor:
    """The fp32 scale that lets the largest E4M3 group scale represent `absmax`, as 6 or, `adaptive`, as 4 too."""
    return absmax * (1 / (_E2M1_MAX * (_ADAPTIVE_MAX if adaptive else _E4M3_MAX)))


def e4m3_scales(absmax: Tensor, unit: Tensor, stretch: float = 1.0) -> Tensor:
    """E4M3 group scales in units of `unit` (broadcastable), `stretch` times as large, saturating at 448."""
    ratio = absmax * (1 / _E2M1_MAX) * grids.reciprocal(unit) * stretch
    return ratio.clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn)


def multipliers(ideal: Tensor, row_scale: Tensor) -> Tensor:
    """Signed two-level multipliers (int8) nearest to ideal group scales (..., G) over row_scale (..., 1).

    A group that is not all zero gets at least one unit, in the sign of its ideal scale.
    """
    ratio = ideal * grids.reciprocal(row_scale)
    magnitude = ratio.abs().round().clamp(1, MAX_MULTIPLIER)
    return torch.where(ideal == 0, 0.0, magnitude.copysign(ratio)).to(torch.int8)


def effective(stored: Tensor | None, format: WeightFormat, unit: Tensor | None = None) -> Tensor:
    """The scales the arithmetic uses, fp32 (N, G), from stored group scales and the row or tensor scale `unit`."""
    if format.scale == "row":
        assert unit is not None, "row scales are stored in `unit`"
        return unit[:, None]
    assert stored is not None, f"{format.scale} scales are stored per group"
    if format.scale == "fp16":
        return stored.float()
    if format.scale == "e8m0":
        return e8m0_values(stored)
    assert unit is not None, f"{format.scale} scales need a row or tensor scale"
    return stored.float() * (unit[:, None] if format.scale == "two_level" else unit)
