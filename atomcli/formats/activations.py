"""Activations: dynamic quantization of a layer's input, per token and group.

This file is the rule; the kernels reproduce its codes bit for bit. All arithmetic is fp32 in the order written here and
never fused, constants in parentheses are folded first, divisions by a scale are products with its reciprocal (torch
divides by a constant differently on CPU and GPU), rounding is to nearest, ties to even.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from atomcli.formats import grids, scales
from atomcli.formats.groups import expand, split
from atomcli.formats.scheme import ActivationFormat, Scheme

# Two-level activations fill INT8 with x8 = m * q (+ b): symmetric -120...105, asymmetric 17 * 15 = 255 steps.
_SYMMETRIC_RANGE = 15 * 7
_MAX_ASYMMETRIC_MULTIPLIER = 17


@dataclass
class QuantizedActivations:
    """Quantized inputs of T tokens: body codes and scales, INT8 outliers; in the layout's channel order.

    codes int8 (T, body). Row scales: token_scale fp32 (T,). fp16, e8m0 and e4m3 scales: group_scales (T, G), e4m3 in
    units of token_scale. Two-level: token_scale, multipliers int8 (T, G), and offsets int8 (T, G) if asymmetric.
    outlier_codes int8 (T, O), outlier_scale fp32 (T,).
    """

    format: ActivationFormat
    codes: Tensor
    token_scale: Tensor | None = None
    group_scales: Tensor | None = None
    multipliers: Tensor | None = None
    offsets: Tensor | None = None
    outlier_codes: Tensor | None = None
    outlier_scale: Tensor | None = None

    def integers(self) -> Tensor:
        """The exact INT8 body operand, int8 (T, body): the codes, or m * q + b of two-level scales."""
        if self.multipliers is None:
            return self.codes
        body, group = self.codes.shape[1], self.format.group
        values = self.codes.to(torch.int16) * expand(self.multipliers, body, group)
        if self.offsets is not None:
            values = values + expand(self.offsets, body, group)
        return values.to(torch.int8)

    def dequantize(self) -> Tensor:
        """The input the arithmetic sees, fp32 (T, K)."""
        if self.format.scale in ("row", "two_level"):
            assert self.token_scale is not None
            body = self.integers().float() * self.token_scale[:, None]
        else:
            body = grids.decode(self.codes, self.format.grid)
            body = body * expand(self.scales(), body.shape[1], self.format.group)
        if self.outlier_codes is None:
            return body
        assert self.outlier_scale is not None
        return torch.cat([body, self.outlier_codes.float() * self.outlier_scale[:, None]], dim=1)

    def scales(self) -> Tensor:
        """Group scales the arithmetic uses, fp32 (T, G), of fp16, e8m0 and e4m3 formats."""
        assert self.group_scales is not None, f"{self.format.scale} activations have no group scales"
        if self.format.scale == "e8m0":
            return scales.e8m0_values(self.group_scales)
        if self.format.scale == "e4m3":
            assert self.token_scale is not None
            return self.group_scales.float() * self.token_scale[:, None]
        return self.group_scales.float()


def quantize_activations(x: Tensor, scheme: Scheme) -> QuantizedActivations:
    """Quantize x (T, K) fp32, already in the layout's order and basis, by the scheme's activation format.

    Outlier channels (the last `scheme.outliers`) become INT8 with one scale per token, never clipped.
    """
    format = scheme.activations
    body = x[:, : x.shape[1] - scheme.outliers]
    quantized = _QUANTIZERS[format.scale](body, format)
    if scheme.outliers:
        outliers = x[:, body.shape[1] :]
        quantized.outlier_scale = outliers.abs().amax(dim=1) * (1 / grids.INT8.high)
        ratio = outliers * grids.reciprocal(quantized.outlier_scale)[:, None]
        quantized.outlier_codes = grids.encode(ratio, grids.INT8)
    return quantized


def _per_token(x: Tensor, format: ActivationFormat) -> QuantizedActivations:
    token_scale = x.abs().amax(dim=1) * (format.clip / format.grid.high)
    codes = grids.encode(x * grids.reciprocal(token_scale)[:, None], format.grid)
    return QuantizedActivations(format, codes, token_scale=token_scale)


def _per_group(x: Tensor, format: ActivationFormat) -> QuantizedActivations:
    groups = split(x, format.group)
    absmax = groups.abs().amax(dim=-1)
    quantized = QuantizedActivations(format, x)
    if format.scale == "e8m0":
        quantized.group_scales = scales.e8m0_exponents(absmax * format.clip)
    elif format.scale == "e4m3":
        # One unit per token, not per tensor: a request must not depend on its neighbours in the batch.
        unit = scales.e4m3_unit(absmax.amax(dim=1) * format.clip, adaptive=format.adaptive)
        quantized.token_scale, unit = unit, unit[:, None]
        quantized.group_scales = scales.e4m3_scales(absmax * format.clip, unit)
        if format.adaptive:
            on_four = scales.e4m3_scales(absmax * format.clip, unit, stretch=1.5)
            better = _e2m1_error(groups, on_four, unit) < _e2m1_error(groups, quantized.group_scales, unit)
            quantized.group_scales = torch.where(better, on_four.float(), quantized.group_scales.float()).to(
                torch.float8_e4m3fn
            )
    else:
        quantized.group_scales = (absmax * (format.clip / format.grid.high)).half()
    inverse = expand(grids.reciprocal(quantized.scales()), x.shape[1], format.group)
    quantized.codes = grids.encode(x * inverse, format.grid)
    return quantized


def _e2m1_error(groups: Tensor, stored: Tensor, unit: Tensor) -> Tensor:
    """Squared error (T, G) of groups (T, G, 16) in E2M1 with E4M3 scales (T, G) in units of `unit` (T, 1).

    Neighbours are added first, then neighbouring pairs, and so on: sums in another order could decide otherwise.
    """
    scale = (stored.float() * unit)[..., None]
    error = grids.decode(grids.encode(groups * grids.reciprocal(scale), grids.E2M1), grids.E2M1) * scale - groups
    error = error.square()
    while error.shape[-1] > 1:
        error = error[..., 0::2] + error[..., 1::2]
    return error[..., 0]


def _two_level(x: Tensor, format: ActivationFormat) -> QuantizedActivations:
    return _two_level_symmetric(x, format) if format.symmetric else _two_level_asymmetric(x, format)


def _two_level_symmetric(x: Tensor, format: ActivationFormat) -> QuantizedActivations:
    absmax = split(x, format.group).abs().amax(dim=-1)
    token_scale = absmax.amax(dim=1) * (format.clip / _SYMMETRIC_RANGE)
    inverse = grids.reciprocal(token_scale)[:, None]
    multipliers = (absmax * inverse * (format.clip / format.grid.high)).round().clamp(1, scales.MAX_MULTIPLIER)
    ratio = x * inverse * expand(1.0 / multipliers, x.shape[1], format.group)
    codes = grids.encode(ratio, format.grid)
    return QuantizedActivations(format, codes, token_scale=token_scale, multipliers=multipliers.to(torch.int8))


def _two_level_asymmetric(x: Tensor, format: ActivationFormat) -> QuantizedActivations:
    groups = split(x, format.group)  # a ragged group's padding zeros take part in its range
    low, high = groups.amin(dim=-1) * format.clip, groups.amax(dim=-1) * format.clip
    token_scale = torch.maximum(-low, high).amax(dim=1) * (1 / grids.INT8.high)
    inverse = grids.reciprocal(token_scale)[:, None]
    low, high = low * inverse, high * inverse
    multipliers = ((high - low) * (1 / 15)).round().clamp(1, _MAX_ASYMMETRIC_MULTIPLIER)
    # Centre the 16 levels on the range, inside INT8: -128 <= b and 15 * m + b <= 127.
    offsets = ((low + high) * 0.5 - 7.5 * multipliers).round().clamp(min=-128)
    offsets = torch.minimum(offsets, 127 - 15 * multipliers)
    body, group = x.shape[1], format.group
    ratio = (x * inverse - expand(offsets, body, group)) * expand(1.0 / multipliers, body, group)
    codes = grids.encode(ratio, format.grid)
    return QuantizedActivations(
        format,
        codes,
        token_scale=token_scale,
        multipliers=multipliers.to(torch.int8),
        offsets=offsets.to(torch.int8),
    )


_QUANTIZERS = {
    "row": _per_token,
    "fp16": _per_group,
    "e8m0": _per_group,
    "e4m3": _per_group,
    "two_level": _two_level,
}
