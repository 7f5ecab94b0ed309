"""Rounding to nearest: scales per group, codes, INT8 outliers; what GPTQ does with the columns it can't compensate."""

import torch
from torch import Tensor

from atomcli.algorithms.clipping import Clip, choose_group_scales, choose_unit
from atomcli.formats import grids, scales
from atomcli.formats.groups import expand, split
from atomcli.formats.scheme import Scheme
from atomcli.formats.weights import QuantizedWeight


def round_to_nearest(
    weight: Tensor, importance: Tensor, scheme: Scheme, clip: Clip, unit: Tensor | None = None
) -> QuantizedWeight:
    """The nearest codes of `weight` (N, K) fp32 in its layout's order; importance (K,) weighs a searched clip.

    unit: the scale that is not per group, where several linears share one; None chooses it from this weight.
    """
    format, body = scheme.weights, scheme.body(weight.shape[1])
    if format.element == "float":
        raise ValueError("a weight that stays in 16 bits is not rounded: use `unrounded`")
    columns, importance = weight[:, :body], importance[:body]
    if unit is None:
        unit = choose_unit(columns, importance, format, clip)
    stored = choose_group_scales(split(columns, format.group), split(importance, format.group), format, clip, unit)
    scale = expand(scales.effective(stored, format, unit), body, format.group)
    codes = grids.encode(columns * grids.reciprocal(scale), format.grid)
    outlier_codes, outlier_scale = round_outliers(weight[:, body:])
    return QuantizedWeight.from_codes(scheme, codes, stored, unit, outlier_codes, outlier_scale)


def round_outliers(weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """INT8 codes (N, O) and fp32 row scales (N,) of outlier columns; (None, None) when there are none."""
    if weight.shape[1] == 0:
        return None, None
    scale = weight.abs().amax(dim=1) / grids.INT8.high
    return grids.encode(weight * grids.reciprocal(scale)[:, None], grids.INT8), scale


def unrounded(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
    """`weight` (N, K) in its layout's order, kept in `dtype`: the weight of a scheme whose weights are float."""
    rows, columns = weight.shape
    return QuantizedWeight(scheme, (rows, columns), weight.to(dtype))
