"""Grids: the values a low-bit element can take, and the way between values and codes.

A code is what is stored (int8 in memory, packed on disk); its value is what the arithmetic sees. Integer codes are
their own values. E2M1 codes are 4 bits, sign | exponent | mantissa (OCP Microscaling Formats v1.0, table 5).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Below this a scale is taken for zero: its reciprocal would overflow fp32, and a GPU flushes such numbers anyway.
SMALLEST_SCALE = 1e-30


@dataclass(frozen=True)
class Grid:
    """The values of one element type: codes of `bits` bits whose values lie between `low` and `high`."""

    name: str
    bits: int
    low: float
    high: float


INT4 = Grid("int4", 4, -7, 7)  # weights with positive scales: absmax maps to 7
INT4_FULL = Grid("int4", 4, -8, 7)  # signed scales map the largest element to -8; clipped activations reach below -7
UINT4 = Grid("int4", 4, 0, 15)  # asymmetric: offset carries the minimum
INT8 = Grid("int8", 8, -127, 127)
E2M1 = Grid("e2m1", 4, -6, 6)


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale in fp32, and 0 where the scale is zero, so that an empty group's codes come out 0 instead of NaN."""
    scale = scale.float()
    usable = scale.abs() >= SMALLEST_SCALE
    return torch.where(usable, 1.0 / torch.where(usable, scale, 1.0), 0.0)


def encode(ratio: Tensor, grid: Grid) -> Tensor:
    """Codes (int8, same shape) of `ratio` = value / scale: nearest grid point, ties to even, saturating at the ends."""
    if grid.name == "e2m1":
        magnitude = ratio.abs()
        step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
        rounded = ((magnitude / step).round() * step).clamp(max=6.0)
        index = torch.where(rounded < 2, rounded * 2, torch.where(rounded < 4, rounded + 2, rounded / 2 + 4))
        return (index + 8 * ((ratio < 0) & (index > 0))).to(torch.int8)
    return ratio.round().clamp(grid.low, grid.high).to(torch.int8)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """Values (fp32, same shape) of `codes`."""
    if grid.name == "e2m1":
        index = (codes & 7).float()
        magnitude = torch.where(index < 4, index * 0.5, torch.where(index < 6, index - 2, index * 2 - 8))
        return torch.where(codes > 7, -magnitude, magnitude)
    return codes.float()
