"""Weight scales: from the range of a group to the scale that loses least.

`clip` is a fixed ratio of each group's range, or "search": then every group takes the ratio with the smallest squared
error, each channel weighted by its importance (the diagonal of the Hessian). Two-level scales choose their row scale
first and their integer multipliers after it; the sign of a multiplier says which end of a group is mapped to -8.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from atomcli.formats import grids, scales
from atomcli.formats.groups import split
from atomcli.formats.scheme import WeightFormat

Clip = float | Literal["search"]

# Ratios of the range. E2M1 may gain from a range beyond the largest element, because its steps are uneven (mapping it
# to 4 instead of 6 is the ratio 1.5); E8M0 has only powers of two to choose from.
_INTEGER_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
_E2M1_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 1.1, 1.25, 1.5)
_E8M0_RATIOS = (1.0, 2.0, 0.5)
# Row scales of two-level weights, relative to the one that gives the widest group the largest multiplier.
_ROW_RATIOS = (1.0, 0.86, 0.72, 0.6, 1.1)
# Rows are searched in chunks of about this many weights, so that temporaries stay small beside a block.
_CHUNK = 1 << 24
# Candidates are judged together as long as they make no more numbers than this: on a GPU launches are what counts, on
# the CPU the cache.
_TOGETHER = {"cpu": 1 << 16, "cuda": 1 << 24}


def choose_unit(weights: Tensor, importance: Tensor, format: WeightFormat, clip: Clip) -> Tensor | None:
    """The scale that is not per group: fp32 (N,) for row and two-level scales, (1,) for e4m3, None for the others.

    weights (N, body) and importance (body,) fp32.
    """
    if format.scale == "e4m3":
        return scales.e4m3_unit(weights.abs().amax()).reshape(1)
    if format.scale not in ("row", "two_level"):
        return None
    rows = max(1, _CHUNK // max(1, weights.shape[1]))
    search = _row_scale if format.scale == "row" else _two_level_row_scale
    return torch.cat([search(chunk, importance, format, clip) for chunk in weights.split(rows)])


def choose_group_scales(
    groups: Tensor, importance: Tensor, format: WeightFormat, clip: Clip, unit: Tensor | None
) -> Tensor | None:
    """Stored scales (N, G) of `groups` (N, G, g) fp32 with importance (G, g); None where the scale is the unit alone.

    A ragged group is padded with zero channels of importance 0. `unit` is what `choose_unit` gave.
    """
    if format.scale == "row":
        return None
    rows = max(1, _CHUNK // max(1, groups[0].numel()))
    units = [unit] * -(-groups.shape[0] // rows) if unit is None or unit.numel() == 1 else unit.split(rows)
    search = _multipliers if format.scale == "two_level" else _ranged_scales
    chunks = zip(groups.split(rows), units, strict=True)
    return torch.cat([search(chunk, importance, format, clip, part) for chunk, part in chunks])


def _ratios(format: WeightFormat, clip: Clip) -> tuple[float, ...]:
    if clip != "search":
        return (clip,)
    if format.scale == "e8m0":
        return _E8M0_RATIOS
    return _E2M1_RATIOS if format.element == "e2m1" else _INTEGER_RATIOS


def weighted_error(groups: Tensor, scale: Tensor, importance: Tensor, grid: grids.Grid) -> Tensor:
    """Squared rounding error (..., N, G) of groups (N, G, g) with scales (..., N, G), weighted by importance (G, g)."""
    codes = grids.encode(groups * grids.reciprocal(scale)[..., None], grid)
    difference = grids.decode(codes, grid).mul_(scale[..., None]).sub_(groups)
    return (difference.square_() * importance).sum(dim=-1)


def _best(
    candidates: Tensor,
    scale_of: Callable[[Tensor], Tensor],
    groups: Tensor,
    importance: Tensor,
    grid: grids.Grid,
) -> tuple[Tensor, Tensor]:
    """The elementwise best of `candidates` (C, N, G) and its error; earlier candidates win ties."""
    at_once = max(1, _TOGETHER.get(groups.device.type, _TOGETHER["cpu"]) // max(1, groups.numel()))
    best, best_error = candidates[0], torch.full_like(groups[..., 0], torch.inf)
    for some in candidates.split(at_once):
        errors = weighted_error(groups, scale_of(some), importance, grid)
        first = errors.argmin(dim=0, keepdim=True)  # the first of equal ones
        candidate, error = some.gather(0, first)[0], errors.gather(0, first)[0]
        better = error < best_error
        best = torch.where(better, candidate, best)
        best_error = torch.where(better, error, best_error)
    return best, best_error


def _times(ratios: Sequence[float], ranges: Tensor) -> Tensor:
    """`ranges` (N, G) times each ratio, (C, N, G)."""
    return torch.tensor(ratios, device=ranges.device)[:, None, None] * ranges


def _ranged_scales(groups: Tensor, importance: Tensor, format: WeightFormat, clip: Clip, unit: Tensor | None) -> Tensor:
    """Scales that follow from a clipped range: fp16, e8m0, e4m3."""
    absmax = groups.abs().amax(dim=-1)
    ratios = _ratios(format, clip)
    if len(ratios) == 1:
        return scales.group_scales(absmax * ratios[0], format, unit)

    def scale_of(clipped: Tensor) -> Tensor:
        return scales.effective(scales.group_scales(clipped, format, unit), format, unit)

    best, _ = _best(_times(ratios, absmax), scale_of, groups, importance, format.grid)
    return scales.group_scales(best, format, unit)


def _row_scale(weights: Tensor, importance: Tensor, format: WeightFormat, clip: Clip) -> Tensor:
    largest = weights.abs().amax(dim=1, keepdim=True) / format.grid.high
    ratios = _ratios(format, clip)
    if len(ratios) == 1:
        return (largest * ratios[0]).squeeze(1)
    best, _ = _best(_times(ratios, largest), lambda scale: scale, weights[:, None, :], importance, format.grid)
    return best.squeeze(1)


def _signed_scales(groups: Tensor, clip: Clip) -> Tensor:
    """Ideal scales (C, N, G) of two-level groups: the larger end on -8 (a negative scale when that end is positive)."""
    high, low = groups.amax(dim=-1), groups.amin(dim=-1)
    upper = high > -low
    to_minus_eight = torch.where(upper, -high, -low) / 8
    if clip != "search":
        return (to_minus_eight * clip)[None]
    # The other sign leaves only 7 steps for the larger end, which pays when both ends are about equally far out.
    to_seven = torch.where(upper, high, low) / 7
    return torch.stack([_times(_INTEGER_RATIOS, ideal) for ideal in (to_minus_eight, to_seven)], dim=1).flatten(0, 1)


def _two_level_row_scale(weights: Tensor, importance: Tensor, format: WeightFormat, clip: Clip) -> Tensor:
    groups, weighted = split(weights, format.group), split(importance, format.group)
    ratio = 1.0 if clip == "search" else clip
    widest = groups.abs().amax(dim=(-1, -2)) * (ratio / 8 / scales.MAX_MULTIPLIER)
    best = widest
    best_error: Tensor | None = None
    for row_ratio in _ROW_RATIOS:
        row_scale = widest * row_ratio
        error = _search_multipliers(groups, weighted, format, clip, row_scale)[1].sum(dim=-1)
        if best_error is None:
            best_error = error
            continue
        better = error < best_error
        best = torch.where(better, row_scale, best)
        best_error = torch.where(better, error, best_error)
    return best


def _multipliers(groups: Tensor, importance: Tensor, format: WeightFormat, clip: Clip, unit: Tensor | None) -> Tensor:
    assert unit is not None, "two-level multipliers need their row scale"
    return _search_multipliers(groups, importance, format, clip, unit)[0]


def _search_multipliers(
    groups: Tensor, importance: Tensor, format: WeightFormat, clip: Clip, row_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Multipliers int8 (N, G) and their errors (N, G)."""
    row_scale = row_scale[:, None]
    candidates = scales.multipliers(_signed_scales(groups, clip), row_scale)
    return _best(candidates, lambda stored: stored.float() * row_scale, groups, importance, format.grid)
