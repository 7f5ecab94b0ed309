"""GPTQ: round column by column and let the columns still to come absorb the error (Frantar et al., ICLR 2023).

Columns are taken in the layout's order, ascending energy: each error is pushed towards channels that matter more to
the output and are still free to correct it. The outlier columns come last, absorb what is left and become INT8. Group
scales are computed when their group is reached, from the weights as updated by then.
"""

from typing import Literal

import torch
from torch import Tensor

from atomcli.algorithms.clipping import Clip, choose_group_scales, choose_unit
from atomcli.algorithms.panels import PANEL, round_panel
from atomcli.algorithms.products import tensor_cores
from atomcli.algorithms.rounding import round_outliers
from atomcli.errors import RunError
from atomcli.formats import grids, scales
from atomcli.formats.scheme import Scheme
from atomcli.formats.weights import QuantizedWeight

DAMPING = 0.01
DampingRule = Literal["mean", "relative"]
# Relative damping of a channel that carries next to nothing: of the mean, so that a dead channel can be decomposed.
_DEAD = 1e-6


def damped(hessian: Tensor, damping: float = DAMPING, rule: DampingRule = "mean") -> Tensor:
    """`hessian` (K, K) over the mean of its diagonal, with `damping` added to the diagonal.

    Damping is relative to that mean, or with the rule "relative" to each entry, so that channels of little energy are
    not drowned in it. A Hessian of nothing becomes the identity.
    """
    mean = hessian.diagonal().mean()
    if not bool(mean > 0):
        return torch.eye(hessian.shape[0], dtype=torch.float32, device=hessian.device)
    out = hessian / mean
    diagonal = out.diagonal()
    diagonal.add_(damping if rule == "mean" else diagonal.clamp(min=_DEAD) * damping)
    return out


def error_factor(hessian: Tensor, damping: float = DAMPING, rule: DampingRule = "mean") -> Tensor:
    """The upper triangular U (K, K) with U^T U = (H + damping)^-1, whose row i says where column i's error goes.

    hessian (K, K) fp32, symmetric, damped as by `damped`; the damping grows tenfold until the Cholesky decomposition
    succeeds. Raises RunError when it never does, which takes a Hessian that is not finite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise RunError("A Hessian of the calibration inputs is not finite")
    identity = torch.eye(hessian.shape[0], dtype=torch.float32, device=hessian.device)
    while damping <= 1e4:
        # Decomposing the reversed matrix gives H = R R^T with R upper triangular, so U = R^-1 needs one solve.
        root, failed = torch.linalg.cholesky_ex(damped(hessian, damping, rule).flip(0, 1))
        if not bool(failed):
            root = root.flip(0, 1)  # one matrix less while the next two are made
            factor = torch.linalg.solve_triangular(root, identity, upper=True)
            if bool(torch.isfinite(factor).all()):
                return factor
        damping *= 10
    raise RunError("A Hessian of the calibration inputs can't be decomposed, even with heavy damping")


def gptq(weight: Tensor, factor: Tensor, importance: Tensor, scheme: Scheme, clip: Clip) -> QuantizedWeight:
    """Quantize `weight` (N, K) fp32 in its layout's order, minimising the output error of its calibration inputs.

    factor (K, K): `error_factor` of the Hessian of those inputs, shared by the linears of a site.
    importance (K,): the Hessian's diagonal, by which a searched clip is weighted. `weight` is left alone.
    """
    format, (rows, channels) = scheme.weights, weight.shape
    body, group = scheme.body(channels), scheme.weights.group or scheme.body(channels)
    unit = choose_unit(weight[:, :body], importance[:body], format, clip)
    columns = weight.t().contiguous()  # (K, N): a column of the weight is one contiguous row
    if columns.data_ptr() == weight.data_ptr():
        columns = columns.clone()
    codes = torch.empty(body, rows, dtype=torch.int8, device=weight.device)
    stored: list[Tensor] = []
    scale = scales.effective(None, format, unit)[:, 0] if format.scale == "row" else torch.empty(0)
    # A panel never crosses the border of a group, where the scale changes.
    width = min(PANEL, group)
    for start in range(0, body, width):
        end = min(start + width, body)
        if start % group == 0 and format.scale != "row":
            until = min(start + group, body)
            members = columns[start:until].t()[:, None, :]
            chosen = choose_group_scales(members, importance[None, start:until], format, clip, unit)
            assert chosen is not None
            stored.append(chosen)
            scale = scales.effective(chosen, format, unit)[:, 0]
        panel, local = columns[start:end].clone(), factor[start:end, start:end]
        round_panel(format.grid, panel, codes[start:end], local, scale, grids.reciprocal(scale))
        columns[end:].addmm_(factor[start:end, end:].t(), panel, alpha=-1)
    outlier_codes, outlier_scale = round_outliers(columns[body:].t())
    group_scales = _join(stored) if stored else None
    return QuantizedWeight.from_codes(scheme, codes.t().contiguous(), group_scales, unit, outlier_codes, outlier_scale)


def _join(stored: list[Tensor]) -> Tensor:
    """Concatenate (N, 1) group scales; through bytes for float8, which has no concatenation on every device."""
    if stored[0].dtype == torch.float8_e4m3fn:
        return torch.cat([each.view(torch.uint8) for each in stored], dim=1).view(torch.float8_e4m3fn)
    return torch.cat(stored, dim=1)


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Output error of `quantized` (N, K) relative to the output of `weight`: tr(dW H dW^T) / tr(W H W^T).

    hessian (K, K), or its diagonal (K,) where nothing more is known.
    """

    def output(matrix: Tensor) -> Tensor:
        with tensor_cores():
            product = matrix @ hessian if hessian.ndim == 2 else matrix * hessian
        return (product * matrix).sum(dtype=torch.float64)

    whole = output(weight)
    return float(output(quantized - weight) / whole) if float(whole) > 0 else 0.0
