"""The integer GEMM with warp MMAs: its sums on the emulator, and compiled for every architecture."""

import pytest
import torch

from atomcli.formats.scheme import SCHEMES, Scheme
from atomcli.formats.weights import QuantizedWeight
from atomcli.kernels import reference, warp_gemm
from atomcli.kernels.compiler import compile_source
from atomcli.kernels.layouts import prepare_weight
from tests.kernels import quantize_cases as cases
from tests.kernels.disassembly import compiles, disassembles, sass
from tests.kernels.emulator import COMPILER, HostKernel
from tests.kernels.gemm_cases import relative_error
from tests.kernels.test_quantize import run

W8A8 = SCHEMES["w8a8"]
ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120a")


def random_weight(scheme: Scheme, rows: int, channels: int) -> QuantizedWeight:
    """Random integers with two-level or row scales."""
    body = scheme.body(channels)
    four = scheme.weights.element == "int4"
    codes = torch.randint(-8 if four else -127, 8 if four else 128, (rows, body), dtype=torch.int8)
    multipliers = torch.randint(-15, 16, (rows, -(-body // 128)), dtype=torch.int8) if four else None
    outliers = torch.randint(-127, 128, (rows, scheme.outliers), dtype=torch.int8) if scheme.outliers else None
    scale = torch.rand(rows) if scheme.outliers else None
    return QuantizedWeight.from_codes(scheme, codes, multipliers, torch.rand(rows), outliers, scale)


@pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")
@pytest.mark.parametrize(
    ("name", "tokens", "rows", "channels", "splits"),
    [("w4a8", 13, 100, 400, 1), ("w4a4", 5, 65, 700, 3), ("w8a8", 17, 128, 300, 2)],
)
def test_sums_and_scales(name: str, tokens: int, rows: int, channels: int, splits: int) -> None:
    torch.manual_seed(0)
    scheme = SCHEMES[name]
    weight = random_weight(scheme, rows, channels)
    layout = cases.random_layout(channels, scheme.outliers, True, False, scheme.transform == "hadamard")
    x, bias = cases.random_rows(tokens, channels, torch.bfloat16), torch.randn(rows)
    activations = cases.reference(x, scheme, layout)
    expected = reference.linear_from_integers(reference.integer_sums(activations, weight), activations, weight, bias)
    operand, _, _ = run(x, scheme, layout)
    packed = prepare_weight(weight)
    grid, blocks = (-(-rows // 64), -(-tokens // 16), splits), packed.body.shape[1]
    y = torch.full((tokens, rows), float("nan"))
    partials = torch.full((grid[0] * grid[1] * splits * 64 * 16,), float("nan"))
    counters = torch.zeros(grid[0] * grid[1], dtype=torch.int32)
    defines = {"ROW_WARPS": 4, "TOKEN_WARPS": 1, "ROW_TILES": 1, "TOKEN_TILES": 2, "STAGES": 3, "OUTPUT": "float"}
    HostKernel(warp_gemm.INTEGERS, "gemm", {**defines, "WEIGHT_BITS": packed.bits}).launch(
        grid, 128, packed.body, packed.outliers, operand.codes, operand.codes[blocks:], None, packed.row_scale,
        packed.outlier_row_scale, operand.token_scale, operand.outlier_scale, bias, y, partials, counters, rows, tokens,
        operand.token_scale.shape[0], blocks,
    )  # fmt: skip
    assert not counters.any()
    assert relative_error(y, expected) < 1e-6


@pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")
def test_the_large_tile() -> None:
    torch.manual_seed(1)
    weight = random_weight(W8A8, 160, 256)
    layout = cases.random_layout(256, 0, False, False, False)
    x = cases.random_rows(70, 256, torch.bfloat16)
    activations = cases.reference(x, W8A8, layout)
    expected = reference.linear_from_integers(reference.integer_sums(activations, weight), activations, weight)
    operand, _, _ = run(x, W8A8, layout)
    packed = prepare_weight(weight)
    y, defines = torch.full((70, 160), float("nan")), warp_gemm.tile(70, "float", 2, 4, 108)[0]
    HostKernel(warp_gemm.INTEGERS, "gemm", {**defines, "WEIGHT_BITS": 8}).launch(
        (2, 1, 1), 256, packed.body, None, operand.codes, None, None, packed.row_scale, None, operand.token_scale,
        operand.outlier_scale, None, y, None, None, 160, 70, 72, 2,
    )  # fmt: skip
    assert relative_error(y, expected) < 1e-6


@compiles
@disassembles
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_to_int8_mmas(arch: str, tmp_path) -> None:
    for bits, tokens in ((4, 4096), (4, 16), (8, 4096), (8, 1)):
        defines, _, _ = warp_gemm.tile(tokens, "bf16", 32, 64, 108)
        program = compile_source(warp_gemm.INTEGERS, arch, {**defines, "WEIGHT_BITS": bits})
        assert program.resources["gemm"].spill_bytes == 0
        assert "IMMA.16832.S8.S8" in sass(program.cubin, tmp_path)
