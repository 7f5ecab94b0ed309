"""Rounding a panel of columns one after the other, in one launch: see cuda/round_columns.cu and algorithms.panels."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from atomcli.errors import UnsupportedError
from atomcli.formats.grids import Grid
from atomcli.kernels.quantize_launch import Launchable

PANEL = 128
_WARPS = 8
_SHARED_BYTES = 4 * PANEL * PANEL

Loader = Callable[[str, dict[str, int | str]], Launchable]
"""Finds a compiled kernel of round_columns.cu by its entry and its defines."""


@cache
def usable(device: torch.device) -> bool:
    """Whether the kernels run on a device: a GPU, and a compiler for it."""
    if device.type != "cuda":
        return False
    from atomcli.kernels.compiler import require_compiler

    try:
        require_compiler()
    except UnsupportedError:
        return False
    return True


def round_panel(
    grid: Grid, panel: Tensor, codes: Tensor, local: Tensor, scale: Tensor, inverse: Tensor, load: Loader | None = None
) -> None:
    """`algorithms.panels.round_panel` on the card: panel and codes (c, N) are overwritten."""
    _launch("round_panel", grid, (panel, codes), local, scale, inverse, load or _loader(panel.device))


def move_panel(
    grid: Grid,
    values: Tensor,
    codes: Tensor,
    gradient: Tensor,
    local: Tensor,
    scale: Tensor,
    inverse: Tensor,
    load: Loader | None = None,
) -> None:
    """`algorithms.panels.move_panel` on the card: values and codes (c, N) are overwritten."""
    _launch("move_panel", grid, (values, codes, gradient), local, scale, inverse, load or _loader(values.device))


def _launch(
    entry: str, grid: Grid, panels: tuple[Tensor, ...], local: Tensor, scale: Tensor, inverse: Tensor, load: Loader
) -> None:
    count, rows = panels[0].shape
    assert all(panel.is_contiguous() for panel in panels), "a panel is consecutive rows of a contiguous matrix"
    local = local if local.stride(1) == 1 else local.contiguous()  # a factorization may come out transposed
    scale, inverse = scale.contiguous(), inverse.contiguous()
    load(entry, {"E2M1": int(grid.name == "e2m1")}).launch(
        -(-rows // _WARPS),
        32 * _WARPS,
        *panels,
        local,
        scale,
        inverse,
        count,
        rows,
        local.stride(0),
        0 if scale.ndim == 1 else rows,
        float(grid.low),
        float(grid.high),
    )


def _loader(device: torch.device) -> Loader:
    from atomcli.kernels.compiler import load_kernel

    return lambda entry, defines: load_kernel("round_columns.cu", entry, device, defines, _SHARED_BYTES)
