"""GPTQ that leaves the channels where they are: other engines read groups in the model's own order only.

The scales of all groups are chosen first, from the untouched weight. The columns are then rounded by descending
energy, each error absorbed by the columns still to come: the channels that matter most have the most left to correct
them (the "act order" of GPTQ's authors, with static groups).
"""

import torch
from torch import Tensor

from atomcli.algorithms.clipping import Clip, choose_group_scales, choose_unit
from atomcli.algorithms.panels import PANEL, round_panel
from atomcli.formats import grids, scales
from atomcli.formats.groups import expand, split
from atomcli.formats.scheme import Scheme
from atomcli.formats.weights import QuantizedWeight


def descending_energy(hessian: Tensor) -> Tensor:
    """The order (K,) int64 in which columns are taken, from a Hessian (K, K); ties by index."""
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def gptq_in_order(
    weight: Tensor,
    factor: Tensor,
    order: Tensor,
    importance: Tensor,
    scheme: Scheme,
    clip: Clip,
    unit: Tensor | None = None,
) -> QuantizedWeight:
    """Quantize `weight` (N, K) fp32 in natural order, taking its columns in `order` (K,).

    factor (K, K): `error_factor` of the Hessian whose rows and columns stand in `order`. importance (K,): the
    Hessian's diagonal in natural order, by which a searched clip is weighted. unit: the scale that is not per group,
    where several linears share one; None chooses it from this weight. Schemes with outliers have another order.
    """
    if scheme.outliers:
        raise ValueError("outlier channels stand last in their layout; their columns are not taken in another order")
    format, channels = scheme.weights, weight.shape[1]
    if unit is None:
        unit = choose_unit(weight, importance, format, clip)
    stored = choose_group_scales(split(weight, format.group), split(importance, format.group), format, clip, unit)
    scale = expand(scales.effective(stored, format, unit), channels, format.group).t()[order]
    inverse, columns = grids.reciprocal(scale), weight.t()[order]
    codes = torch.empty(channels, weight.shape[0], dtype=torch.int8, device=weight.device)
    for start in range(0, channels, PANEL):
        end = min(start + PANEL, channels)
        panel, local = columns[start:end], factor[start:end, start:end]
        round_panel(format.grid, panel, codes[start:end], local, scale[start:end], inverse[start:end])
        columns[end:].addmm_(factor[start:end, end:].t(), panel, alpha=-1)
    natural = torch.empty_like(codes)
    natural[order] = codes
    return QuantizedWeight.from_codes(scheme, natural.t().contiguous(), stored, unit)
