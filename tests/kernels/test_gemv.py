"""The kernel for one token against the reference, on the emulator, and compiled for every architecture."""

import pytest
import torch

from atomcli.benchmarks.systems import random_weight
from atomcli.formats.scheme import SCHEMES
from atomcli.kernels import gemv, layouts, quantize, reference, rowwise
from atomcli.kernels.compiler import compile_source
from atomcli.kernels.layouts import GemmWeight
from atomcli.kernels.quantize_launch import Prologue
from tests.kernels.disassembly import compiles
from tests.kernels.emulator import COMPILER, HostKernel
from tests.kernels.gemm_cases import relative_error
from tests.kernels.quantize_cases import random_layout

CPU = torch.device("cpu")


@pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")
@pytest.mark.parametrize(
    ("scheme", "rows", "channels", "prologue", "gated"),
    [
        ("w4a8", 100, 580, "plain", False),
        ("w4a8", 320, 704, "add_norm", True),
        ("w8a8", 72, 384, "norm", False),
        ("w4a4", 129, 900, "silu_mul", False),
        ("w8a8", 96, 384, "plain", True),
    ],
)
def test_one_token(scheme: str, rows: int, channels: int, prologue: Prologue, gated: bool) -> None:
    """Blocks with one to eight slices, ragged in both directions."""
    torch.manual_seed(rows)
    kind = SCHEMES[scheme]
    hadamard = kind.transform == "hadamard"
    layout = random_layout(channels, kind.outliers, bool(kind.outliers), hadamard, hadamard)
    quantized = random_weight(kind, rows, channels, CPU)
    assert quantized.unit is not None
    quantized.unit.mul_(torch.rand(rows) + 0.5)
    x, other = torch.randn(2, 1, channels).bfloat16().unbind(0)
    norm_weight, bias = (torch.rand(channels) + 0.5).bfloat16(), torch.randn(rows)
    y, total = gemv.outputs(x, prologue, rows, gated)
    y.fill_(float("nan"))
    kernel_layout = quantize.prepare_layout(layout, CPU)
    gemv.launch(
        lambda how: HostKernel(gemv.SOURCE, gemv.ENTRY, how.defines),
        x, other if prologue in ("add_norm", "silu_mul") else None, norm_weight if "norm" in prologue else None,
        kernel_layout.table, kernel_layout.body, kernel_layout.hadamard, prologue, kind.activations, 1e-5,
        layouts.prepare_weight(quantized), bias, y, total, processors=3, gated=gated,
    )  # fmt: skip
    row = x + other if prologue == "add_norm" else x
    if prologue == "add_norm":
        assert torch.equal(total, row)
    if "norm" in prologue:
        row = rowwise.rms_norm(row, norm_weight, 1e-5)
    if prologue == "silu_mul":
        row = torch.nn.functional.silu(x) * other
    expected = reference.quantized_input(row, kind, layout).double() @ quantized.dequantize().double().T + bias
    if gated:
        gate, up = expected.bfloat16().double().chunk(2, dim=-1)
        expected = torch.nn.functional.silu(gate).bfloat16().double() * up
    assert relative_error(y, expected) < (4e-3 if gated else 2e-3)


@compiles
@pytest.mark.parametrize("arch", ["80", "90a", "120a"])
@pytest.mark.parametrize("scheme", ["w4a8", "w8a8"])
def test_compiles_without_spills(scheme: str, arch: str) -> None:
    kind = SCHEMES[scheme]
    x = torch.empty(1, 11008, dtype=torch.bfloat16)
    table = torch.empty(11008, dtype=torch.uint16) if kind.outliers else None
    how = gemv.plan(
        x, x, None, table, 11008 - kind.outliers, True, "silu_mul", kind.activations, kind.weights.grid.bits
    )
    assert compile_source(gemv.SOURCE, arch, how.defines).resources[gemv.ENTRY].spill_bytes == 0


def test_what_no_block_holds_is_refused() -> None:
    def weight(rows: int, channels: int) -> GemmWeight:
        body = torch.empty(-(-rows // 64), channels // 128, 4160, dtype=torch.uint8, device="meta")
        return GemmWeight(4, (rows, channels), body, torch.empty(0))

    assert gemv.why_not(weight(57344, 8192), 132) is None
    assert "1024 output channels" in str(gemv.why_not(weight(160000, 4096), 132))
    assert "65536 channels" in str(gemv.why_not(weight(4096, 65536), 132))
