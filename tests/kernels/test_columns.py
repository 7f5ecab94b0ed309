"""Panels of columns rounded by one kernel: the same as column by column, and what the assembler makes of it."""

import pytest
import torch

from atomcli.algorithms import panels
from atomcli.formats import grids
from atomcli.kernels import columns
from atomcli.kernels.compiler import compile_source
from tests.kernels.emulator import COMPILER, HostKernel

emulated = pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")


def on_host(entry, defines):
    return HostKernel("round_columns.cu", entry, defines)


def panel_of(count: int, rows: int, whole: bool, seed: int = 0):
    """Values, the panel's part of a matrix of another width, and scales: one per row, or one per element."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, rows, generator=generator)
    inputs = torch.randn(4 * count, count, generator=generator)
    matrix = torch.zeros(count, count + 7)
    matrix[:, :count] = inputs.t() @ inputs / count
    scale = torch.rand(*((count, rows) if whole else (rows,)), generator=generator) * 0.3 + 0.1
    scale[..., 0] = 0
    return values, matrix[:, :count], scale


@emulated
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("grid", [grids.INT4, grids.INT4_FULL, grids.INT8, grids.E2M1], ids=lambda grid: grid.name)
@pytest.mark.parametrize(("count", "rows"), [(128, 19), (64, 8), (37, 3)])
def test_the_kernel_rounds_as_the_operations_do(grid, count, rows, whole):
    values, hessian, scale = panel_of(count, rows, whole)
    inverse = grids.reciprocal(scale)
    factor = torch.linalg.cholesky(hessian, upper=True)
    for name, local, more in (("round_panel", factor, ()), ("move_panel", hessian, (hessian @ values * 0.3,))):
        expected, codes = values.clone(), torch.full((count, rows), 77, dtype=torch.int8)
        getattr(panels, name)(grid, expected, codes, *more, local, scale, inverse)
        found, found_codes = values.clone(), torch.full((count, rows), 99, dtype=torch.int8)
        kept = [each.clone() for each in more]
        getattr(columns, name)(grid, found, found_codes, *more, local, scale, inverse, load=on_host)
        same = (codes == found_codes).all(0)
        assert same.float().mean() > 0.85, "a tie that falls differently changes its row from there on, and no other"
        torch.testing.assert_close(found[:, same], expected[:, same], rtol=1e-3, atol=1e-3)
        assert all(torch.equal(before, after) for before, after in zip(kept, more, strict=True))


@pytest.mark.parametrize("arch", ["80", "90a", "120a"])
@pytest.mark.parametrize("e2m1", [0, 1])
def test_everything_stays_in_registers(arch, e2m1):
    for entry, needed in compile_source("round_columns.cu", arch, {"E2M1": e2m1}).resources.items():
        assert needed.spill_bytes == 0, entry
        assert needed.registers <= 128
