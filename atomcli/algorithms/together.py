"""The linears of a site, which read one input: one Hessian, one factor and one walk over their channels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atomcli.algorithms.clipping import Clip
from atomcli.algorithms.descent import descend
from atomcli.algorithms.gptq import DAMPING, DampingRule, damped, error_factor, gptq
from atomcli.algorithms.ordered import descending_energy, gptq_in_order
from atomcli.formats.scheme import Scheme
from atomcli.formats.weights import QuantizedWeight, tensor_layout


def compensate(
    weights: Sequence[Tensor],
    hessian: Tensor,
    scheme: Scheme,
    clip: Clip,
    *,
    natural: bool = False,
    damping: float = DAMPING,
    damping_rule: DampingRule = "mean",
    sweeps: int = 0,
) -> list[QuantizedWeight]:
    """GPTQ of the weights (N_i, K) fp32 that share the Hessian (K, K) of their inputs, then `sweeps` of descent.

    All stand in their layout's order; `natural` says that it is the model's own (see `ordered`). A scale per tensor
    (e4m3) is one for all of them. Raises RunError for a Hessian that can't be decomposed.
    """
    weight, importance = torch.cat(list(weights)), hessian.diagonal().clone()
    if natural:
        order = descending_energy(hessian)
        factor = error_factor(hessian[order][:, order], damping, damping_rule)
        whole = gptq_in_order(weight, factor, order, importance, scheme, clip)
    else:
        whole = gptq(weight, error_factor(hessian, damping, damping_rule), importance, scheme, clip)
    if sweeps:
        whole = descend(weight, whole, damped(hessian, damping, damping_rule), sweeps)
    return _rows(whole, [each.shape[0] for each in weights])


def _rows(whole: QuantizedWeight, counts: list[int]) -> list[QuantizedWeight]:
    """Consecutive rows of a weight as weights of their own; what is one per tensor is repeated."""
    parts: list[dict[str, Tensor]] = [{} for _ in counts]
    for spec in tensor_layout(whole.scheme, *whole.shape, float_dtype=whole.codes.dtype):
        tensor = getattr(whole, spec.field)
        pieces = tensor.split(counts) if tensor.shape[0] == sum(counts) else [tensor] * len(counts)
        for part, piece in zip(parts, pieces, strict=True):
            part[spec.field] = piece.clone()
    return [
        QuantizedWeight(whole.scheme, (count, whole.shape[1]), **part)
        for count, part in zip(counts, parts, strict=True)
    ]
