"""The GEMM for 4-bit weights and 16-bit activations: what its blocks hold, its operand, and what is made of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atomcli.errors import UnsupportedError, UsageError
from atomcli.formats import grids
from atomcli.formats.scheme import SCHEMES, Scheme, WeightFormat
from atomcli.kernels import compiler, dispatch, weight_gemm, weight_layouts
from atomcli.kernels.quantize import Operand
from atomcli.kernels.weight_layouts import ScaledWeight
from tests.kernels import quantize_cases
from tests.kernels import weight_cases as cases
from tests.kernels.disassembly import compiles, disassembles, sass
from tests.kernels.emulator import COMPILER
from tests.kernels.test_quantize import run


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def weights_of(packed: ScaledWeight) -> Tensor:
    """The weight (rows, channels) that the threads see, word by word as cuda/unpack_f16.cuh says."""
    row_groups, blocks, _ = packed.blocks.shape
    words = packed.blocks[..., :4096].contiguous().view(torch.int32).view(row_groups, blocks, 2, 4, 8, 4, 4)
    groups = 128 // packed.group
    scales = packed.blocks[..., 4096:].contiguous().view(row_groups, blocks, 4, 8, 2, groups, -1)
    weight = torch.zeros(row_groups * 64, blocks * 128)
    for register in range(4):
        for parity in range(2):
            half = words >> 16 * parity & 0xFFFF
            if packed.element == "int4":
                value = ((half >> 4 * register & 15) - 8).float()
            else:
                sign = half >> (15, 12, 14, 13)[register] & 1
                code = half >> (9, 6, 3, 0)[register] & 7
                value = grids.decode((code | sign << 3).to(torch.int8), grids.E2M1)
            for step in range(8):
                scale = read_scale(scales[:, :, :, :, register % 2, step * groups // 8], packed)
                place = value[:, :, step // 4, :, :, :, step % 4] * scale[..., None]  # row group, block, warp, g, c
                rows = torch.arange(row_groups * 64).view(row_groups, 1, 4, 16)[..., 8 * (register % 2) :][
                    ..., :8, None
                ]
                first = 16 * step + 8 * (register // 2) + parity
                columns = (torch.arange(blocks) * 128)[None, :, None, None, None] + first + torch.arange(4) * 2
                weight[rows.expand_as(place), columns.expand_as(place)] = place
    unit = 2.0**-14 if packed.element == "e2m1" else 1.0
    return weight * unit * packed.row_scale[:, None]


def read_scale(stored: Tensor, packed: ScaledWeight) -> Tensor:
    if packed.scale == "FP16":
        return stored.contiguous().view(torch.float16)[..., 0].float()
    byte = stored[..., 0]
    if packed.scale == "MULTIPLIER":
        return byte.float() - 128
    if packed.scale == "E4M3":
        return byte.view(torch.float8_e4m3fn).float() * 2.0**-8
    return byte.view(torch.float8_e5m2).float()


@pytest.mark.parametrize("name", cases.SCHEMES)
def test_blocks_hold_the_weight(name: str) -> None:
    scheme = cases.SCHEMES[name]
    weight = cases.random_weight(scheme, 70, 300)
    packed = weight_layouts.prepare(weight)
    assert packed.blocks.shape == (2, 3, weight_layouts.block_bytes(packed.group, packed.scale))
    expected = torch.nn.functional.pad(weight.dequantize(), (0, 84, 0, 58))
    assert torch.allclose(weights_of(packed), expected, rtol=1e-6, atol=0)


def test_scales_beyond_fp16_keep_their_ratio() -> None:
    scheme = cases.SCHEMES["mxfp4"]
    weight = cases.random_weight(scheme, 64, 128)
    weight.group_scales = torch.tensor([[5, 3, 27, 200]], dtype=torch.uint8).repeat(64, 1)
    weight.group_scales[1] = torch.tensor([0, 1, 2, 3], dtype=torch.uint8)
    seen, expected = weights_of(weight_layouts.prepare(weight))[:64], weight.dequantize()
    assert torch.equal(seen[0, 96:], expected[0, 96:])
    assert (seen[0] - expected[0]).abs().max() <= 2.0**-23 * expected[0].abs().max()
    small = cases.random_weight(cases.SCHEMES["int4-g128"], 64, 256)
    small.group_scales = torch.full((64, 2), 3 * 2.0**-24).half()  # subnormal: two bits
    assert torch.equal(weights_of(weight_layouts.prepare(small))[:64], small.dequantize())


@pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")
@pytest.mark.parametrize(
    ("channels", "permuted", "hadamard", "dtype", "few_tokens"),
    [
        (580, True, True, torch.bfloat16, 264),
        (580, True, True, torch.float16, 0),
        (301, False, True, torch.float32, 0),
        (512, False, False, torch.bfloat16, 264),
    ],
)
def test_operand_is_the_transformed_input(
    channels: int, permuted: bool, hadamard: bool, dtype: torch.dtype, few_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atomcli.kernels.quantize_launch.FEW_TOKENS", few_tokens)  # both mappings of channels to lanes
    scheme = quantize_cases.scheme_of(cases.A16, 0, hadamard)
    layout = quantize_cases.random_layout(channels, 0, permuted, permuted, hadamard)
    x = quantize_cases.random_rows(9, channels, dtype)
    operand, _, _ = run(x, scheme, layout, container="f16")
    numbers = cases.halves(operand.codes)
    assert not numbers[:, channels:].any()
    assert not numbers[9:].any()
    assert torch.equal(operand.token_scale[:9], cases.power_scale(layout.apply(x)))
    seen = numbers[:9, :channels].float() * operand.token_scale[:9, None]
    assert torch.equal(seen, cases.rounded(x, layout))
    if not hadamard and dtype == torch.bfloat16:
        assert torch.equal(seen, layout.apply(x))  # 16-bit numbers as they are


def test_fp16_operands_cost_a_tenth_of_the_outputs_rounding() -> None:
    """Why operands are fp16: the same product with bf16 operands would miss the contract's 2e-3."""
    scheme = cases.SCHEMES["int4-g128"]
    weight = cases.random_weight(scheme, 256, 2048)
    layout = quantize_cases.random_layout(2048, 0, False, False, True)
    x = torch.randn(64, 2048).bfloat16()
    exact = layout.apply(x).double() @ weight.dequantize().double().T
    scales, row_scale = weight_layouts._scales(weight)
    halves = (weight.body_codes().half() * scales.view(torch.float16).repeat_interleave(128, 1)).double()
    errors = {}
    for kind, operand in (("fp16", cases.rounded(x, layout)), ("bf16", layout.apply(x).bfloat16())):
        w = halves * row_scale.double()[:, None] if kind == "fp16" else weight.dequantize().bfloat16().double()
        y = operand.double() @ w.T
        errors[kind] = float((y - exact).norm() / exact.norm())
        errors[f"{kind}, stored"] = float((y.bfloat16().double() - exact).norm() / exact.norm())
    assert errors["fp16"] < 4e-4
    assert errors["fp16, stored"] < 1.8e-3
    assert errors["bf16, stored"] > 2e-3


@compiles
@disassembles
@pytest.mark.parametrize("name", ["two-level", "int4-g128", "mxfp4", "nvfp4"])
def test_tiles_compile_to_half_mmas_without_spills(name: str, tmp_path: Path) -> None:
    weight = weight_layouts.prepare(cases.random_weight(cases.SCHEMES[name], 64, 128))
    tiles = weight_gemm.TILES if name == "nvfp4" else weight_gemm.TILES[::6]  # NVFP4 has the most scales
    for tile in {weight_gemm.fit(tile, weight.group, weight.scale) for tile in tiles}:
        program = compiler.compile_source(weight_gemm.SOURCE, "90a", weight_gemm.defines(tile, weight, torch.bfloat16))
        assert program.resources["gemm"].spill_bytes == 0, tile
        assert f"HGMMA.64x{tile.tokens}x16.F32 " in sass(program.cubin, tmp_path)


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 256, 257, 4096])
@pytest.mark.parametrize("rows", [64, 4096, 28672])
def test_tiles_fit_into_shared_memory(tokens: int, rows: int) -> None:
    for group, scale in ((128, "MULTIPLIER"), (16, "FP16")):
        tile = weight_gemm.tile_for(rows, 32, tokens, 132, group, scale)  # type: ignore[arg-type]
        assert tile.stages >= 2
        assert weight_gemm._shared_bytes(tile, group, scale) <= 227 << 10  # type: ignore[arg-type]


def test_misfits_are_refused() -> None:
    float_weights = Scheme(WeightFormat("int8"), cases.A16)
    assert "4-bit weights" in (weight_layouts.why_not(float_weights) or "")
    assert "outlier" in (weight_layouts.why_not(Scheme(WeightFormat("int4"), cases.A16, 64)) or "")
    assert "sm_80" in (weight_gemm.why_not(cases.SCHEMES["two-level"], "80") or "")
    assert weight_gemm.why_not(cases.SCHEMES["two-level"], "90a") is None
    codes = torch.zeros(64, 128, dtype=torch.int8)
    weight = cases.QuantizedWeight.from_codes(float_weights, codes, None, torch.ones(64))
    with pytest.raises(UnsupportedError, match="4-bit weights"):
        weight_layouts.prepare(weight)
    packed = weight_layouts.prepare(cases.random_weight(cases.SCHEMES["two-level"], 64, 256))
    codes, scale = torch.zeros(2, 8, 128, dtype=torch.uint8), torch.ones(8)
    with pytest.raises(UsageError, match=r"the weight needs 8-bit \(4, tokens, 128\)"):
        weight_gemm.linear(Operand(codes, codes, scale, scale, codes), packed, 8, torch.bfloat16)


def test_the_dispatcher_says_which_card_has_it() -> None:
    for name, scheme in cases.SCHEMES.items():
        assert dispatch.choose_for(scheme, "90a").kernel == "gemm_w4a16_sm90a", name
        assert "sm_90a, none for sm_89" in (dispatch.choose_for(scheme, "89").reason or "")
    assert "weights stay in 16 bits" in (dispatch.choose_for(SCHEMES["w16a16"], "90a").reason or "")


def test_torch_knows_the_output_before_the_kernel_runs() -> None:
    packed = weight_layouts.prepare(cases.random_weight(cases.SCHEMES["mxfp4"], 200, 256))
    codes, scale = torch.empty(4, 16, 128, dtype=torch.uint8, device="meta"), torch.empty(16, device="meta")
    weight = replace(packed, blocks=packed.blocks.to("meta"), row_scale=packed.row_scale.to("meta"))
    operand = Operand(codes, codes, scale, scale, codes)
    assert weight_gemm.linear(operand, weight, 11, torch.float16).shape == (11, 200)
    starts, stack = torch.empty(4, dtype=torch.int32, device="meta"), weight_layouts.stack([weight] * 3)
    assert weight_gemm.expert_linear(operand, stack, starts, 11, torch.bfloat16).shape == (11, 200)
    with pytest.raises(UsageError, match="3 experts needs 4 int32 starts"):
        weight_gemm.expert_linear(operand, stack, starts[:2], 11, torch.bfloat16)
