"""GEMMs with a float scale per group: numerics on the emulator, packing, and what the assembler makes of them."""

import pytest
import torch
from torch import Tensor

from atomcli.errors import InputError
from atomcli.formats.scheme import SCHEMES
from atomcli.formats.weights import QuantizedWeight
from atomcli.kernels import group_gemm, reference, warp_gemm
from atomcli.kernels.compiler import compile_source
from atomcli.kernels.group_layouts import pack_groups, pack_int8
from tests.kernels import quantize_cases as cases
from tests.kernels.disassembly import compiles, disassembles, sass
from tests.kernels.emulator import COMPILER, HostKernel
from tests.kernels.gemm_cases import GROUP_SCHEMES, random_group_weight, relative_error
from tests.kernels.test_quantize import run

emulated = pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")
SM80 = "gemm_w4a4_exact_sm80.cu"
TILE = {"ROW_WARPS": 4, "TOKEN_WARPS": 1, "ROW_TILES": 1, "TOKEN_TILES": 2, "STAGES": 3, "OUTPUT": "float"}


def emulate(x: Tensor, weight: QuantizedWeight, layout, splits: int, bias: Tensor | None, **extra: int) -> Tensor:
    """The kernel that reads nibbles on the emulator; poisoned output and workspace."""
    scheme = weight.scheme
    operand, _, _ = run(x, scheme, layout, container="nibble")
    packed = pack_groups(weight, "s4")
    (tokens, _), rows = x.shape, weight.shape[0]
    blocks, padded = packed.blocks.shape[1], operand.token_scale.shape[0]
    grid = (-(-rows // 64), -(-tokens // 16), splits)
    y = torch.full((tokens, rows), float("nan"))
    partials = torch.full((grid[0] * grid[1] * splits * 64 * 16,), float("nan"))
    counters = torch.zeros(grid[0] * grid[1], dtype=torch.int32)
    file, defines = group_gemm.nibble_kernel(scheme)
    HostKernel(file, "gemm", {**TILE, **defines, **extra}).launch(
        grid, 128, packed.blocks, packed.outliers, operand.codes, operand.outlier_codes, operand.group_scales,
        packed.row_scale, packed.outlier_scale, operand.token_scale, operand.outlier_scale, bias, y, partials,
        counters, rows, tokens, padded, blocks,
    )  # fmt: skip
    assert not counters.any()
    return y


@emulated
@pytest.mark.parametrize(
    ("tokens", "rows", "channels", "outliers", "splits", "native"),
    [
        (13, 100, 400, 128, 1, True),
        (13, 100, 400, 128, 3, True),
        (3, 65, 256, 64, 1, False),
        (18, 130, 385, 0, 2, False),
    ],
)
def test_native_int4(tokens: int, rows: int, channels: int, outliers: int, splits: int, native: bool) -> None:
    torch.manual_seed(0)
    scheme = GROUP_SCHEMES[{128: "int4-g128", 64: "int4-g128-64-outliers", 0: "int4-g128-no-outliers"}[outliers]]
    weight, layout = (
        random_group_weight(scheme, rows, channels),
        cases.random_layout(channels, outliers, True, False, False),
    )
    x, bias = cases.random_rows(tokens, channels, torch.bfloat16), torch.randn(rows)
    activations = cases.reference(x, scheme, layout)
    sums = reference.integer_sums(activations, weight)
    expected = reference.linear_from_integers(sums, activations, weight, bias)
    defines = {} if native else {"EMULATED_INT4": 1}
    y = emulate(x, weight, layout, splits, bias, **defines)
    assert relative_error(y, expected) < 1e-6  # fp32 all the way


@emulated
@pytest.mark.parametrize("name", ["e2m1-g128", "mxfp4", "nvfp4-outliers"])
def test_block_scaled_fp4(name: str) -> None:
    torch.manual_seed(1)
    scheme = GROUP_SCHEMES[name]
    weight = random_group_weight(scheme, 70, 400)
    layout = cases.random_layout(400, scheme.outliers, True, True, scheme.transform == "hadamard")
    x = cases.random_rows(11, 400, torch.bfloat16)
    expected = cases.reference(x, scheme, layout).dequantize().double() @ weight.dequantize().double().T
    assert relative_error(emulate(x, weight, layout, 2, None), expected) < 1e-6


def unpacked_e4m3(block: Tensor, is_e2m1: bool) -> Tensor:
    """One block's codes as e4m3 values (64, 128), by the fragment's definition (cuda/unpack.cuh)."""
    values = torch.zeros(64, 128)
    for thread in range(128):
        warp, g, c = thread // 32, thread % 32 // 4, thread % 4
        for word in range(8):
            packed = block[word // 4 * 2048 + thread * 16 + word % 4 * 4 :][:4].int()
            upper, lower = packed & 0x87, packed << 1 & 0x80 | packed >> 3 & 7
            channel = 32 * (word // 2) + 16 * (word % 2) + 4 * c
            for half, byte in enumerate((upper, lower)):
                if is_e2m1:
                    byte = byte & 0x80 | (byte & 7) << 2
                values[16 * warp + g + 8 * half, channel : channel + 4] = (
                    byte.to(torch.uint8).view(torch.float8_e4m3fn).float()
                )
    return values


@pytest.mark.parametrize("name", ["int4-g128", "e2m1-g128", "mxfp4", "nvfp4"])
def test_e4m3_blocks_hold_the_codes_and_scales(name: str) -> None:
    torch.manual_seed(0)
    scheme = GROUP_SCHEMES[name]
    weight = random_group_weight(scheme, 70, 300)
    packed = pack_groups(weight, "e4m3")
    is_e2m1 = scheme.weights.element == "e2m1"
    codes = torch.zeros(128, packed.blocks.shape[1] * 128)
    codes[:70, : weight.body] = weight.body_codes().float() if not is_e2m1 else 0
    if is_e2m1:
        from atomcli.formats import grids

        codes[:70, : weight.body] = grids.decode(weight.body_codes(), grids.E2M1)
    for group, block in ((0, 0), (1, packed.blocks.shape[1] - 1)):
        values = unpacked_e4m3(packed.blocks[group, block], is_e2m1) * (64 if is_e2m1 else 512)
        assert torch.equal(values, codes[group * 64 : group * 64 + 64, block * 128 : block * 128 + 128])
    per_block = 128 // scheme.weights.group
    stored = packed.blocks[0, 0, 4096:].view(weight.group_scales.dtype).view(64, per_block)
    wanted = weight.group_scales[:64, :per_block]
    assert torch.equal(
        stored.view(torch.uint8), wanted.contiguous().view(torch.uint8).view(stored.view(torch.uint8).shape)
    )


def test_int8_fragments() -> None:
    codes = torch.arange(64 * 128, dtype=torch.int32).reshape(64, 128).to(torch.int8)
    packed = pack_int8(codes)[0].view(torch.int8).view(4, 128, 4, 4)
    for step, thread, register in ((0, 0, 0), (1, 37, 1), (2, 70, 2), (3, 127, 3)):
        row = thread // 32 * 16 + thread % 32 // 4 + 8 * (register % 2)
        channel = 32 * step + 16 * (register // 2) + 4 * (thread % 4)
        assert torch.equal(packed[step, thread, register], codes[row, channel : channel + 4])


def test_a_code_outside_the_grid_is_refused() -> None:
    weight = random_group_weight(GROUP_SCHEMES["int4-g128"], 64, 256)
    weight.codes[3, 5] = 0x88
    with pytest.raises(InputError, match="-8"):
        pack_groups(weight, "e4m3")


@compiles
@disassembles
@pytest.mark.parametrize("arch", ["80", "86", "89"])
@pytest.mark.parametrize("tokens", [8, 4096])
def test_int4_is_native_before_hopper(arch: str, tokens: int, tmp_path) -> None:
    defines, _, _ = warp_gemm.tile(tokens, "bf16", 32, 64, 108)
    program = compile_source(SM80, arch, defines)
    assert program.resources["gemm"].spill_bytes == 0
    text = sass(program.cubin, tmp_path)
    assert "IMMA.16864.S4.S4" in text
    assert "sub_byte" not in text  # the routine that stands in where INT4 is not native
    loop = text[text.index("IMMA.16864.S4.S4") : text.rindex("IMMA.16864.S4.S4")]
    assert "I2F" not in loop  # promotion needs no conversion: the accumulator is a float already


@compiles
@disassembles
@pytest.mark.parametrize("tokens", [8, 4096])
@pytest.mark.parametrize("name", ["e2m1-g128", "mxfp4", "nvfp4"])
def test_blackwell_multiplies_fp4(name: str, tokens: int, tmp_path) -> None:
    file, defines = group_gemm.nibble_kernel(GROUP_SCHEMES[name])
    tile, _, _ = warp_gemm.tile(tokens, "bf16", 32, 64, 170)
    program = compile_source(file, "120a", {**tile, **defines})
    assert program.resources["gemm"].spill_bytes == 0
    assert "OMMA.SF.16864" in sass(program.cubin, tmp_path)


@compiles
@disassembles
@pytest.mark.parametrize(
    ("tokens", "rows"), [(1, 4096), (16, 28672), (32, 28672), (64, 4096), (64, 28672), (128, 4096)]
)
@pytest.mark.parametrize("name", ["int4-g128", "e2m1-g128", "mxfp4", "nvfp4"])
def test_hopper_multiplies_e4m3(name: str, tokens: int, rows: int, tmp_path) -> None:
    shape = group_gemm.shape_for(tokens, rows, 32, 132, GROUP_SCHEMES[name], torch.bfloat16)
    program = compile_source("gemm_groups_sm90a.cu", "90a", shape.defines)
    assert program.resources["gemm"].spill_bytes == 0
    assert shape.shared_bytes * shape.blocks_per_sm <= group_gemm.SHARED_LIMIT
    text = sass(program.cubin, tmp_path)
    assert "QGMMA" in text
    assert "IGMMA" in text  # the outliers


@compiles
@disassembles
@pytest.mark.parametrize("name", ["int4-g128", "e2m1-g128"])
def test_three_warpgroups_spill_nothing_that_counts(name: str, tmp_path) -> None:
    """160 registers, 128 of them accumulators: a counter is spilled, one store and one load in 230 instructions."""
    shape = group_gemm.shape_for(4096, 4096, 32, 132, GROUP_SCHEMES[name], torch.bfloat16)
    assert shape.defines["ROW_GROUPS"] == 3
    program = compile_source("gemm_groups_sm90a.cu", "90a", shape.defines)
    assert program.resources["gemm"].stack_bytes <= 48
    text = sass(program.cubin, tmp_path)
    loop = text[text.index("QGMMA") : text.index("IGMMA")].split("BRA")[0]
    assert loop.count("LDL") + loop.count("STL") <= 2


def test_reasons() -> None:
    assert group_gemm.why_not(SCHEMES["atom-paper"], "90a") is None
    assert group_gemm.why_not(SCHEMES["nvfp4"], "90a") is None
    assert "sm_86" in (group_gemm.why_not(SCHEMES["nvfp4"], "86") or "")
    assert "same" in (group_gemm.why_not(SCHEMES["w4a8"], "90a") or "")
    assert group_gemm.why_not(SCHEMES["nvfp4"], "120a") is None
