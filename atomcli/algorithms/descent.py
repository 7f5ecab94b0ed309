"""Coordinate descent on codes: what GPTQ leaves on the table, because it never looks back.

GPTQ rounds a column before it knows what the later ones become. Here every column, with all others held, moves to the
code that minimises tr((Q - W) H (Q - W)^T), which never raises the error (Behdin et al., "QuantEase", 2023). Scales
stay as they are.
"""

from dataclasses import replace

import torch
from torch import Tensor

from atomcli.algorithms.panels import PANEL, move_panel
from atomcli.formats import grids, packing
from atomcli.formats.weights import QuantizedWeight


def descend(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor, sweeps: int) -> QuantizedWeight:
    """`quantized` with better codes for `weight` (N, K) fp32 after `sweeps` passes over all columns.

    hessian (K, K), positive definite: damped as for GPTQ.
    """
    format, body, channels = quantized.scheme.weights, quantized.body, weight.shape[1]
    values = quantized.dequantize().t().contiguous()
    gradient = hessian @ (values - weight.t())
    codes = torch.empty_like(values, dtype=torch.int8)
    scale = quantized.scales().t().contiguous()
    group = format.group or body
    parts = [(start, min(start + min(PANEL, group), body)) for start in range(0, body, min(PANEL, group))]
    parts += [(start, min(start + PANEL, channels)) for start in range(body, channels, PANEL)]
    for _ in range(sweeps):
        for start, end in parts:
            inside = start < body
            grid, own = (format.grid, scale[start // group]) if inside else (grids.INT8, quantized.outlier_scale)
            assert own is not None
            before, local = values[start:end].clone(), hessian[start:end, start:end]
            now = (values[start:end], codes[start:end], gradient[start:end])
            move_panel(grid, *now, local, own, grids.reciprocal(own))
            gradient.addmm_(hessian[:, start:end], values[start:end] - before)
    body_codes, outlier_codes = codes[:body].t().contiguous(), codes[body:].t().contiguous()
    packed = packing.pack_nibbles(body_codes) if format.grid.bits == 4 else body_codes
    return replace(quantized, codes=packed, outlier_codes=outlier_codes if quantized.scheme.outliers else None)
