"""GEMMs whose operands both carry a float scale per group: the paper's W4A4 as it is written, and the FP4 formats.

y[t, n] = sum over groups of s_x[t, g] * s_w[n, g] * (sum of codes), plus the INT8 outliers' term. On sm_90a codes are
e4m3 bytes (cuda/gemm_groups_sm90a.cu). Elsewhere they are nibbles: INT4 in groups of 128 runs on native INT4 MMAs
before sm_90 and on INT8 ones after (cuda/gemm_w4a4_exact_sm80.cu), FP4 on the block-scaled MMAs of sm_120a
(cuda/gemm_fp4_sm120a.cu).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from atomcli.errors import UsageError
from atomcli.formats.scheme import ActivationFormat, Scheme, WeightFormat
from atomcli.kernels import gemm_launch, warp_gemm
from atomcli.kernels.compiler import load_kernel, multiprocessors
from atomcli.kernels.group_layouts import CHANNELS, ROWS, Codes, PackedGroups
from atomcli.kernels.quantize import Operand
from atomcli.kernels.tiles import OUTPUTS
from atomcli.kernels.workspace import workspace

WEIGHT_SCALES = {"fp16": ("FP16", 2), "e8m0": ("E8M0", 1), "e4m3": ("E4M3", 1)}
SHARED_LIMIT = 227 << 10  # of an SM of sm_90a


class Shape(NamedTuple):
    """A kernel of gemm_groups_sm90a.cu: what is compiled in, its threads, shared memory and output tile."""

    defines: Mapping[str, int | str]
    threads: int
    shared_bytes: int
    rows: int
    tokens: int
    blocks_per_sm: int


def why_not(scheme: Scheme, arch: str) -> str | None:
    """The reason why these kernels can't run `scheme` on `arch`, or None if they can."""
    weights, activations = scheme.weights, scheme.activations
    if weights.scale not in WEIGHT_SCALES or (weights.element, weights.group, weights.scale) != (
        activations.element, activations.group, activations.scale,
    ):  # fmt: skip
        return "weights and activations need the same 4-bit format with a float scale per group"
    if scheme.outliers > CHANNELS:
        return f"at most {CHANNELS} outlier channels fit, the scheme has {scheme.outliers}"
    if arch == "90a":
        if weights.element == "int8" or (weights.scale == "fp16" and weights.group != CHANNELS):
            return f"fp16 scales are read per {CHANNELS} channels of a 4-bit format"
        return None
    if weights.element == "int8":
        return "INT8 weights have one scale per row"
    if weights.element == "e2m1" and arch != "120a":
        return f"FP4 needs sm_90a or sm_120a, there is no kernel for sm_{arch}"
    if weights.scale == "fp16" and weights.group != CHANNELS:
        return f"fp16 scales are read per {CHANNELS} channels"
    return None


def codes_for(arch: str) -> Codes:
    """The code order that the kernel of `arch` reads; also the container its activations come in ("s4": nibbles)."""
    return "e4m3" if arch == "90a" else "s4"


def shape_for(tokens: int, rows: int, blocks: int, processors: int, scheme: Scheme, dtype: torch.dtype) -> Shape:
    """The tile for y (tokens, rows) over `blocks` k-blocks on sm_90a, as measured on an H100 (docs/kernel-log.md).

    Tokens are padded to the MMA's width. Two blocks per SM hide each other's waits, but split a small problem into more
    parts than it is worth; three warpgroups promote in each other's shadow once there are tiles for all SMs.
    """
    tile = next((n for n in (8, 16, 32, 64) if tokens <= n), 128)
    units_per_block = -(-rows // (2 * ROWS)) * -(-tokens // tile) * blocks / (2 * processors)
    blocks_per_sm = 2 if tile <= 64 and units_per_block >= 12 else 1
    tiles = -(-rows // (3 * ROWS)) * -(-tokens // tile)
    row_groups = 3 if tile == 128 and scheme.weights.group == CHANNELS and tiles * 5 >= processors * 6 else 2
    scale, scale_bytes = WEIGHT_SCALES[scheme.weights.scale]
    assert scheme.weights.group is not None
    groups = CHANNELS // scheme.weights.group
    weight_bytes = ROWS * CHANNELS // 2 + ROWS * groups * scale_bytes
    stage = -(-(tile * CHANNELS + groups * tile * 4 + row_groups * weight_bytes) // 1024) * 1024
    fixed = 1024 + row_groups * 4 * min(tile, 32) * 48
    stages = min(16, ((SHARED_LIMIT - 2048) // blocks_per_sm - fixed) // stage)
    defines: dict[str, int | str] = {
        "TOKENS": tile,
        "PART_TOKENS": 32 if tile == 64 and blocks_per_sm == 2 else tile,
        "ROW_GROUPS": row_groups,
        "STAGES": stages,
        "BLOCKS_PER_SM": blocks_per_sm,
        "ELEMENT": scheme.weights.element.upper(),
        "GROUP": scheme.weights.group,
        "WEIGHT_SCALE": scale,
        "OUTPUT": OUTPUTS[dtype],
    }
    threads = row_groups * 128 + (64 if blocks_per_sm == 2 else 128)
    return Shape(defines, threads, fixed + stages * stage, row_groups * ROWS, tile, blocks_per_sm)


def linear(
    operand: Operand, weight: PackedGroups, scheme: Scheme, tokens: int, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """y (tokens, rows) in `dtype`, bf16 or fp16, of quantized tokens and a packed weight; `bias` fp32 (rows,).

    The operand's container is "e4m3", or "nibble" for codes "s4". Raises UsageError for operands that do not fit.
    """
    width = CHANNELS if weight.codes == "e4m3" else CHANNELS // 2
    blocks = weight.blocks.shape[1] + (weight.outliers is not None and weight.codes == "e4m3")
    if operand.codes.shape[0] != blocks or operand.codes.shape[2] != width or operand.codes.shape[1] < tokens:
        raise UsageError(
            f"The operand is {tuple(operand.codes.shape)}; the weight's {weight.codes} codes need "
            f"({blocks}, {tokens}, {width})."
        )
    gemm_launch.check_common(operand, weight.blocks, weight.rows, dtype, bias)
    format = scheme.weights
    return torch.ops.atom.gemm_groups(
        *operand, weight.blocks, weight.row_scale, weight.outliers, weight.outlier_scale, bias, format.element,
        format.group, format.scale, weight.codes, weight.rows, tokens, dtype,
    )  # fmt: skip


def multiply(
    operand: Operand, weight: PackedGroups, scheme: Scheme, tokens: int, dtype: torch.dtype, bias: Tensor | None = None,
    shape: Shape | None = None,
) -> Tensor:  # fmt: skip
    """What `linear` does, without the operator around it and with a tile of one's choice."""
    output = torch.empty((tokens, weight.rows), dtype=dtype, device=weight.blocks.device)
    if tokens and weight.codes == "e4m3":
        processors = multiprocessors(output.device)
        shape = shape or shape_for(tokens, weight.rows, weight.blocks.shape[1], processors, scheme, dtype)
        _multiply_sm90a(operand, weight, shape, output, bias)
    elif tokens:
        _multiply_nibbles(operand, weight, scheme, output, bias)
    return output


def _multiply_sm90a(operand: Operand, weight: PackedGroups, shape: Shape, output: Tensor, bias: Tensor | None) -> None:
    gemm_launch.check_alignment(operand, weight.blocks)
    device = output.device
    row_tiles, token_tiles = -(-weight.rows // shape.rows), -(-output.shape[0] // shape.tokens)
    blocks, padded = weight.blocks.shape[1], operand.token_scale.shape[0]
    grid = multiprocessors(device) * shape.blocks_per_sm
    units = row_tiles * token_tiles * (blocks + (weight.outliers is not None))
    grid = min(grid, max(1, units // 2))
    # Whole rounds of tiles go to the blocks one each; the rest, or all of a small problem, is split among them.
    split_tiles = row_tiles * token_tiles % grid
    row_groups = shape.rows // ROWS
    scratch = workspace(device, "groups", grid * shape.rows * shape.tokens, grid * row_groups * 4)
    kernel = load_kernel("gemm_groups_sm90a.cu", "gemm", device, shape.defines, shape.shared_bytes)
    kernel.launch(
        grid, shape.threads, weight.blocks, weight.outliers, operand.codes, operand.group_scales, weight.row_scale,
        weight.outlier_scale, operand.outlier_scale, bias, output, scratch.partials, scratch.flags, weight.rows,
        output.shape[0], padded, blocks, row_tiles, token_tiles, split_tiles, overlap=True,
    )  # fmt: skip


def _multiply_nibbles(
    operand: Operand, weight: PackedGroups, scheme: Scheme, output: Tensor, bias: Tensor | None
) -> None:
    file, defines = nibble_kernel(scheme)
    warp_gemm.launch(
        file, defines, weight.blocks, weight.outliers, operand, weight.row_scale, weight.outlier_scale, bias, output
    )


def nibble_kernel(scheme: Scheme) -> tuple[str, dict[str, int | str]]:
    """The source and the defines, beside the tile's, of the kernel that reads a scheme's codes as nibbles."""
    if scheme.weights.element == "int4":
        return "gemm_w4a4_exact_sm80.cu", {}
    assert scheme.weights.group is not None
    return "gemm_fp4_sm120a.cu", {"GROUP": scheme.weights.group}


# -------------------------------------------------------------------------------------------- operator


@torch.library.custom_op("atom::gemm_groups", mutates_args=(), device_types="cuda")
def _gemm_groups(
    codes: Tensor,
    outlier_codes: Tensor,
    token_scale: Tensor,
    outlier_token_scale: Tensor,
    group_scales: Tensor,
    blocks: Tensor,
    row_scale: Tensor | None,
    outliers: Tensor | None,
    outlier_scale: Tensor | None,
    bias: Tensor | None,
    element: str,
    group: int,
    scale: str,
    order: str,
    rows: int,
    tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    operand = Operand(codes, outlier_codes, token_scale, outlier_token_scale, group_scales)
    weight = PackedGroups(blocks, row_scale, outliers, outlier_scale, rows, order)  # type: ignore[arg-type]
    scheme = Scheme(WeightFormat(element, group, scale), ActivationFormat(element, group, scale))  # type: ignore[arg-type]
    return multiply(operand, weight, scheme, tokens, dtype, bias)


_gemm_groups.register_fake(gemm_launch.empty_output)
