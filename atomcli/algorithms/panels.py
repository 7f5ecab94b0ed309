"""Panels: runs of columns that are rounded one after the other, each moving the ones after it.

A column's turn is a handful of tiny operations, and a panel of 128 columns takes a thousand of them. On a GPU their
launches would cost far more than their work, so there a kernel takes the whole panel. Panels (c, N) hold a column of
the weight in each row.
"""

from torch import Tensor

from atomcli.formats import grids
from atomcli.formats.grids import Grid
from atomcli.kernels import columns

PANEL = columns.PANEL
"""Columns whose updates stay inside a cache-sized panel before they reach the rest of the matrix in one product."""


def round_panel(grid: Grid, panel: Tensor, codes: Tensor, local: Tensor, scale: Tensor, inverse: Tensor) -> None:
    """Round the columns of `panel` (c, N) fp32 into `codes` int8 (c, N); what is left there are their errors over U_ii.

    local (c, c) is the panel's part of GPTQ's factor U. scale and its reciprocal, inverse: (N,) or (c, N).
    """
    if columns.usable(panel.device):
        columns.round_panel(grid, panel, codes, local, scale, inverse)
        return
    scale, inverse = scale.expand_as(panel), inverse.expand_as(panel)
    diagonal = local.diagonal().tolist()
    for i, column in enumerate(panel):
        codes[i] = grids.encode(column * inverse[i], grid)
        column.addcmul_(grids.decode(codes[i], grid), scale[i], value=-1).div_(diagonal[i])
        if i + 1 < panel.shape[0]:
            panel[i + 1 :].addr_(local[i, i + 1 :], column, alpha=-1)


def move_panel(
    grid: Grid, values: Tensor, codes: Tensor, gradient: Tensor, local: Tensor, scale: Tensor, inverse: Tensor
) -> None:
    """Move each column of `values` (c, N) fp32, and of `codes`, to where the error is least with all others held.

    gradient (c, N): half that of the error by the values. local (c, c): the panel's part of the Hessian.
    """
    if columns.usable(values.device):
        columns.move_panel(grid, values, codes, gradient, local, scale, inverse)
        return
    scale, inverse, gradient = scale.expand_as(values), inverse.expand_as(values), gradient.clone()
    diagonal = local.diagonal().tolist()
    for i, value in enumerate(values):
        codes[i] = grids.encode((value - gradient[i] / diagonal[i]) * inverse[i], grid)
        moved = grids.decode(codes[i], grid) * scale[i]
        if i + 1 < values.shape[0]:
            gradient[i + 1 :].addr_(local[i, i + 1 :], moved - value)
        value.copy_(moved)
